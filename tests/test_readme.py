"""Every command and every piece of Python in the README, run as written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    kind: [text for found, text in re.findall(r"```(\w+)\n(.*?)```", README, re.S) if found == kind]
    for kind in ("sh", "python")
}
INSTALL, TEST, USE = BLOCKS["sh"][:3]


def sh(command: str, cwd: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_first_command_on_a_fresh_machine(tmp_path):
    """A clone of what is committed, with nothing installed: the real command, unchanged."""
    clone = tmp_path / "fuseweights"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    done = sh(INSTALL, clone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fused 2 qkv" in done.stdout and "Equal: " in done.stdout


def test_ci_runs_the_second_command_as_written():
    found = re.findall(r"grep -E '(.+)' README.md", (ROOT / ".ci" / "run").read_text())
    assert [line for line in README.splitlines() if re.search(found[0], line)] == [TEST.strip()]


@pytest.fixture
def place(tmp_path):
    """The files that the README's examples speak of."""
    shutil.copy(ROOT / "examples" / "tiny-llama-q4_k_m.gguf", tmp_path / "model.gguf")
    pytest.importorskip("torch", reason="the Hugging Face examples need fuseweights[test]")
    import hf_formats
    import hf_models

    hf_formats.save("fp8_block", tmp_path / "Qwen3-8B-FP8")
    hf_models.save("phi3", tmp_path / "phi-3-mini")
    hf_models.save("qwen3", tmp_path / "Qwen3-0.6B")
    return tmp_path


def test_the_examples(place):
    lines = [line.partition("#")[0].strip() for line in USE.splitlines() if line.strip()]
    assert len(lines) >= 7
    digest = hashlib.sha256((place / "model.gguf").read_bytes()).hexdigest()
    for line in lines:
        if line.startswith("fuseweights unfuse  model"):
            (place / "model.gguf").unlink()  # it would be in the way
        done = sh(line.replace("1b2c…", digest), place)
        assert done.returncode == 0, (line, done.stderr)
    assert hashlib.sha256((place / "model.gguf").read_bytes()).hexdigest() == digest


def test_the_python(place, monkeypatch):
    monkeypatch.chdir(place)
    for block in BLOCKS["python"]:
        exec(compile(block, "README.md", "exec"), {})
    assert (place / "model-fused.gguf").exists()


def test_the_options_it_names_exist():
    from typer.testing import CliRunner

    from fuseweights.cli import app

    helps = "".join(
        CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("inspect", "convert", "verify", "unfuse", "bench")
    )
    for option in set(re.findall(r"`(--[a-z0-9-]+)", README)):
        assert option in helps, option
