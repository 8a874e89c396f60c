"""The command line: exit codes, what goes to which stream, JSON, and what is never printed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import reduce
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from gguf import GGUFReader
from raw_gguf import STRING, U32, layer, pack, write, write_split

import fuseweights
from fuseweights.cli import main

COMMANDS = ("inspect", "convert", "verify", "unfuse")
CLI = [sys.executable, "-m", "fuseweights"]
ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\nError: forged"


class Result(NamedTuple):
    code: object
    out: str
    err: str


def run(*args: object) -> Result:
    """The command line in this process: neither stream is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fuseweights", *map(str, args)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as exit,
    ):
        main()
    return Result(exit.value.code, out.getvalue(), err.getvalue())


def child(*args: object, **options) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own."""
    return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, **options)


# --- files: every test may use any of them by name --------------------------------------------

HEAD = [("llama.block_count", U32, 3)]


def refused_layer(n: int) -> list:
    return layer(n, q=64, kv=32, attn_v="Q4_0")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind; layers 0 and 1 of `in.gguf` fuse, 2 does not, so `plain.gguf` is the
    one that --strict accepts."""
    made = tmp_path_factory.mktemp("made")
    good = [*layer(0, q=64, kv=32, bias=True), *layer(1, q=64, kv=32)]
    write(made / "plain.gguf", good, HEAD)
    src = write(made / "in.gguf", [*good, *refused_layer(2)], HEAD)
    write(made / "refused.gguf", [*refused_layer(0), *refused_layer(1)], HEAD)
    fuseweights.convert(src, made / "fused.gguf")
    damaged = bytearray((made / "fused.gguf").read_bytes())
    fused = fuseweights.open_checkpoint(made / "fused.gguf").tensors["blk.1.attn_qkv.weight"]
    damaged[fused.offset + 100] ^= 1
    (made / "damaged.gguf").write_bytes(damaged)
    (made / "truncated.gguf").write_bytes(src.read_bytes()[:-5000])
    (made / "text.gguf").write_text("Once upon a time")
    (made / "empty.gguf").touch()
    (made / "directory").mkdir()
    split = write_split(made, [layer(n, q=64, kv=32) for n in range(3)], stem="set")
    fuseweights.convert(split, made / "fusedset.gguf")
    return made


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of all that was `made`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(name: str) -> str:
    return sha256(Path(name).read_bytes()).hexdigest()


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- exit codes -------------------------------------------------------------------------------

DONE = [
    "--version",
    "--help",
    "inspect in.gguf",
    "inspect in.gguf --for torch",
    "inspect fused.gguf",
    "inspect refused.gguf",
    "inspect set-00002-of-00003.gguf",
    "convert in.gguf out.gguf",
    "convert in.gguf out.gguf --dry-run",
    "convert in.gguf out.gguf --dry-run --for torch",
    "convert in.gguf fused.gguf --overwrite",
    "convert in.gguf out.gguf --fuse qkv,experts --threads 2",
    "convert plain.gguf out.gguf --strict",
    "convert set-00003-of-00003.gguf out --resume",
    "verify in.gguf fused.gguf",
    "verify in.gguf fused.gguf --values",
    "verify in.gguf in.gguf",
    "verify set-00001-of-00003.gguf fusedset-00003-of-00003.gguf",
    "verify fused.gguf --source-sha256 {sum}",
    "verify fused.gguf --source-sha256 {SUM}",
    "verify fused.gguf --source-sha256 fused.gguf={sum}",
    "unfuse fused.gguf out.gguf",
    "unfuse fused.gguf plain.gguf --overwrite",
]
DIFFERS = [
    "verify in.gguf damaged.gguf",
    "verify in.gguf damaged.gguf --values",
    "verify plain.gguf fused.gguf",
    "verify in.gguf set-00001-of-00003.gguf",
    "verify damaged.gguf --source-sha256 {sum}",
    "verify fused.gguf --source-sha256 {zeros}",
]
USAGE = [
    "verify fused.gguf in.gguf",
    "nonsense",
    "convert",
    "convert in.gguf",
    "convert in.gguf out.gguf more.gguf",
    "convert in.gguf out.gguf --nonsense",
    "convert in.gguf out.gguf --threads 0",
    "convert in.gguf out.gguf --threads many",
    "convert in.gguf out.gguf --for vllm",
    "convert in.gguf out.gguf --for sglang",
    "convert in.gguf out.gguf --for nobody",
    "convert in.gguf out.gguf --dry-run --for nobody",
    "convert in.gguf out.gguf --fuse nonsense",
    "convert in.gguf out.gguf --fuse qkv,nonsense,rubbish",
    "inspect in.gguf --for vllm",
    "inspect in.gguf --for nobody",
    "verify in.gguf",
    "verify in.gguf fused.gguf --source-sha256 {sum}",
    "verify fused.gguf --source-sha256 {sum} --values",
    "verify fused.gguf --source-sha256 12",
    "verify fused.gguf --source-sha256 {sum}0",
    "verify fused.gguf --source-sha256 x{sum}",
    "verify fused.gguf --source-sha256 nonsense={sum}",
    "verify fused.gguf --source-sha256 fused.gguf=12",
    "verify fused.gguf --source-sha256 {sum} --source-sha256 {sum}",
    "verify fusedset-00001-of-00003.gguf --source-sha256 {sum}",
    "unfuse fused.gguf",
]
REFUSED = [
    "convert in.gguf plain.gguf",
    "convert in.gguf in.gguf",
    "convert in.gguf in.gguf --overwrite",
    "convert in.gguf directory --overwrite",
    "convert in.gguf out.gguf --strict",
    "convert in.gguf out.gguf --strict --dry-run",
    "convert in.gguf out.gguf --fuse experts",
    "convert refused.gguf out.gguf",
    "convert refused.gguf out.gguf --dry-run",
    "convert fused.gguf out.gguf",
    "convert set-00002-of-00003.gguf set.gguf --overwrite",
    "unfuse in.gguf out.gguf",
    "unfuse fused.gguf in.gguf",
    "unfuse fused.gguf fused.gguf --overwrite",
    "verify in.gguf --source-sha256 {sum}",
]
UNREADABLE = [
    "inspect absent.gguf",
    "inspect directory",
    "inspect empty.gguf",
    "inspect text.gguf",
    "inspect truncated.gguf",
    "convert absent.gguf out.gguf",
    "convert text.gguf out.gguf --dry-run",
    "convert truncated.gguf out.gguf",
    "convert in.gguf absent/out.gguf",
    "convert in.gguf text.gguf/out.gguf",
    "verify in.gguf absent.gguf",
    "verify absent.gguf in.gguf",
    "verify truncated.gguf --source-sha256 {sum}",
    "unfuse text.gguf out.gguf",
]
CASES = [
    (code, command)
    for code, commands in enumerate((DONE, DIFFERS, USAGE, REFUSED, UNREADABLE))
    for command in commands
]


def words(command: str) -> list[str]:
    value = digest("in.gguf")
    return command.format(sum=value, SUM=value.upper(), zeros="0" * 64).split()


@pytest.mark.parametrize(("code", "command"), CASES, ids=[f"{c} {line}" for c, line in CASES])
def test_exit_code(here: Path, code: int, command: str) -> None:
    before = files(here)
    result = run(*words(command))
    assert result.code == code, result.err
    if code < 2:
        assert result.err == ""
        assert result.out
        return
    assert result.out == ""
    assert files(here) == before, "something was written"
    assert sorted(p.name for p in here.iterdir() if p.is_dir()) == ["directory"]
    lines = result.err.splitlines()
    if lines[0].startswith("Usage: "):  # the parser's own: what the command takes, and the error
        assert lines[-1].startswith("Error: ")
        return
    assert lines[0].startswith("Error: ")
    assert lines[-1].startswith("Hint: ")
    assert all(line.startswith("  ") for line in lines[1:-1]), "only refusals stand between"


def test_no_arguments_is_help() -> None:
    result = run()
    assert result.code == 2
    assert "Usage: " in result.err
    assert all(command in result.err for command in COMMANDS)


@pytest.mark.parametrize("code", range(5))
def test_exit_code_of_the_process(here: Path, code: int) -> None:
    """The same through the interpreter's own exit."""
    command = next(line for c, line in reversed(CASES) if c == code)
    assert child(*words(command)).returncode == code


INTERRUPTED = """
import os, signal, sys
from fuseweights import cli, {module}
{module}.{name} = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT)
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        ("api", "inspect", "inspect in.gguf"),
        ("writer", "_write_all", "convert in.gguf out.gguf"),
        ("writer", "publish", "convert in.gguf out.gguf --json"),
        ("api", "verify", "verify in.gguf fused.gguf"),
    ],
)
def test_exit_code_when_interrupted(here: Path, module: str, name: str, command: str) -> None:
    before = files(here)
    script = INTERRUPTED.format(module=module, name=name)
    done = subprocess.run(
        [sys.executable, "-c", script, *command.split()], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "Interrupted."
    assert files(here) == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupted_set_says_how_to_go_on(here: Path) -> None:
    script = """
import os, signal, sys
from fuseweights import cli, writer
write_file, begun = writer.write_file, []
def stop_at_third(*args, **options):
    begun.append(args)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    write_file(*args, **options)
writer.write_file = stop_at_third
cli.main()
"""
    command = ["convert", "set-00001-of-00003.gguf", "out.gguf", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.split("\n")[:2] == ["2 of 3 files are done: --resume", "Interrupted."]
    assert run(*command, "--resume").code == 0


# --- JSON -------------------------------------------------------------------------------------

PLAN = {"schema", "consumer", "source", "groups", "refusals", "copied", "bytes", "needs"}
GROUP = {"group", "layer", "fused", "parts", "sections", "dtype", "companions"}
REFUSAL = {"group", "layer", "parts", "reason", "detail"}
VERIFICATION = {"schema", "ok", "checked", "bytes", "differences"}
DIFFERENCE = {"tensor", "offset", "detail"}


def loaded(*args: object, code: int = 0) -> dict:
    """The one object on stdout; nothing else there, nothing at all on stderr."""
    result = run(*args, "--json")
    assert (result.code, result.err) == (code, "")
    found = json.loads(result.out)
    assert found["schema"] == 1
    return found


def test_json_of_convert(here: Path) -> None:
    planned = loaded("convert", "in.gguf", "out.gguf", "--dry-run")
    assert not Path("out.gguf").exists()
    assert loaded("convert", "in.gguf", "out.gguf") == planned
    assert loaded("convert", "in.gguf", "quiet.gguf", "--quiet") == planned

    assert planned.keys() >= PLAN
    assert (planned["consumer"], planned["source"]) == ("llama.cpp", "in.gguf")
    assert all(group.keys() == GROUP for group in planned["groups"])
    first, second = planned["groups"]
    assert first == {
        "group": "qkv",
        "layer": 0,
        "fused": "blk.0.attn_qkv.weight",
        "parts": ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"],
        "sections": [64, 32, 32],
        "dtype": "Q8_0",
        "companions": ["blk.0.attn_qkv.bias"],
    }
    assert (second["layer"], second["companions"]) == (1, [])
    (refusal,) = planned["refusals"]
    assert refusal.keys() == REFUSAL
    assert (refusal["group"], refusal["layer"], refusal["reason"]) == ("qkv", 2, "type-mismatch")
    assert len(refusal["parts"]) == 3
    assert planned["bytes"] == Path("out.gguf").stat().st_size
    result = fuseweights.open_checkpoint("out.gguf")
    assert planned["copied"] == len(result.tensors) - 3  # two weights and a bias
    assert isinstance(planned["needs"], int)


@pytest.mark.parametrize(
    "options",
    ["--for torch", "--fuse qkv", "--for torch --fuse gate_up,qkv", "--threads 1 --overwrite"],
)
@pytest.mark.parametrize("source", ["in.gguf", "set-00002-of-00003.gguf"])
def test_dry_run_prints_what_is_done(here: Path, source: str, options: str) -> None:
    before = files(here)
    planned = run("convert", source, "out.gguf", "--json", "--dry-run", *options.split())
    assert files(here) == before
    assert planned == run("convert", source, "out.gguf", "--json", *options.split())
    written = sum(p.stat().st_size for p in here.glob("out*.gguf"))
    assert json.loads(planned.out)["bytes"] == written


def test_json_of_verify(here: Path) -> None:
    good = loaded("verify", "in.gguf", "fused.gguf")
    tensors = fuseweights.open_checkpoint("fused.gguf").tensors
    assert good.keys() >= VERIFICATION
    assert (good["ok"], good["differences"]) == (True, [])
    assert good["checked"] == len(tensors)
    assert good["bytes"] == sum(tensor.size for tensor in tensors.values())

    bad = loaded("verify", "in.gguf", "damaged.gguf", code=1)
    assert bad.keys() == good.keys()
    (difference,) = bad["differences"]
    assert difference.keys() == DIFFERENCE
    assert (difference["tensor"], difference["offset"]) == ("blk.1.attn_qkv.weight", 100)
    assert bad["ok"] is False


def test_json_of_verify_by_sum(here: Path) -> None:
    right, wrong = digest("in.gguf"), "0" * 64
    good = loaded("verify", "fused.gguf", "--source-sha256", right)
    assert good.keys() >= VERIFICATION
    assert (good["ok"], good["bytes"]) == (True, Path("in.gguf").stat().st_size)
    bad = loaded("verify", "fused.gguf", "--source-sha256", wrong, code=1)
    (difference,) = bad["differences"]
    assert right in difference["detail"]
    assert wrong in difference["detail"]


@pytest.mark.parametrize("wrong", [[], [1], [0, 2]])
def test_sums_of_a_set(here: Path, wrong: list[int]) -> None:
    names = [f"fusedset-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    sums = [digest(f"set-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    for n in wrong:
        sums[n] = "0" * 64
    options = [f"--source-sha256={name}={value}" for name, value in zip(names, sums, strict=True)]
    result = loaded("verify", names[0], *options, code=1 if wrong else 0)
    assert [d["tensor"] for d in result["differences"]] == [names[n] for n in wrong]


def test_sums_of_a_part_of_a_set_do_not_pass_for_the_whole(here: Path) -> None:
    """What was not checked is said, or asked for."""
    option = f"--source-sha256=fusedset-00001-of-00003.gguf={digest('set-00001-of-00003.gguf')}"
    result = run("verify", "fusedset-00001-of-00003.gguf", option)
    assert "fusedset-00003-of-00003.gguf" in result.out + result.err


def test_json_of_unfuse(here: Path) -> None:
    restored = loaded("unfuse", "fused.gguf", "out.gguf")
    assert restored.keys() >= {"source", "restored", "refusals", "copied", "bytes", "inexact"}
    assert (restored["source"], restored["inexact"]) == ("fused.gguf", None)
    assert restored["bytes"] == Path("in.gguf").stat().st_size
    assert Path("out.gguf").read_bytes() == Path("in.gguf").read_bytes()
    assert restored["restored"][0] == {
        "fused": "blk.0.attn_qkv.weight",
        "parts": ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"],
    }


def test_json_of_inspect(here: Path) -> None:
    before = loaded("inspect", "in.gguf")
    planned = loaded("convert", "in.gguf", "out.gguf", "--dry-run")
    for key in ("source", "consumer", "groups", "refusals", "needs"):
        assert before[key] == planned[key]
    assert (before["fused"], before["fused_for"]) == ([], None)
    after = loaded("inspect", "fused.gguf")
    assert after.keys() == before.keys()
    assert (after["groups"], after["fused_for"]) == ([], "llama.cpp")
    assert after["fused"] == [
        {"group": "qkv", "layer": n, "fused": f"blk.{n}.attn_qkv.weight", "layout": "stacked"}
        for n in (0, 1)
    ]
    assert after["needs"] == before["needs"]


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (2, "convert in.gguf out.gguf --fuse nonsense"),
        (3, "convert in.gguf out.gguf --strict"),
        (4, "inspect text.gguf"),
    ],
)
def test_no_json_of_an_error(here: Path, code: int, command: str) -> None:
    result = run(*command.split(), "--json")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("Error: ")


# --- reports ----------------------------------------------------------------------------------


def test_report_of_convert(here: Path) -> None:
    out = run("convert", "in.gguf", "out.gguf").out
    assert "in.gguf: fused 2 qkv" in out
    assert re.search(r"qkv +2 +type-mismatch: .*attn_v is Q4_0", out)
    assert re.search(r"\d tensors unchanged, [\d.]+ kB in \d+\.\d s \([\d.]+ .B/s\)", out)
    assert re.search(r"Needs llama\.cpp b\d+ or newer", out)
    assert "would fuse 2 qkv" in run("convert", "in.gguf", "o.gguf", "--dry-run").out


def test_report_of_inspect(here: Path) -> None:
    out = run("inspect", "in.gguf").out
    assert re.search(r"0–1 +○", out)
    assert re.search(r"\n +2 +×", out)
    assert re.search(r"llama\.cpp +2 +1 +b\d+ or newer", out)
    assert re.search(r"0–1 +●", run("inspect", "fused.gguf").out)


def test_report_of_verify(here: Path) -> None:
    assert run("verify", "in.gguf", "fused.gguf").out.startswith("Equal: ")
    out = run("verify", "in.gguf", "damaged.gguf").out
    assert re.search(r"blk\.1\.attn_qkv\.weight +100 +differs from the source's .*attn_q", out)


def test_report_of_unfuse(here: Path) -> None:
    assert "restored 9 tensors from 3" in run("unfuse", "fused.gguf", "out.gguf").out


@pytest.mark.parametrize(
    "verb", ["convert in.gguf", "convert in.gguf --dry-run", "unfuse fused.gguf"]
)
@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_quiet_prints_nothing(here: Path, verb: str, flag: str) -> None:
    command, source, *rest = verb.split()
    assert run(command, source, "out.gguf", *rest, flag) == (0, "", "")


def test_every_refusal_at_once(here: Path) -> None:
    """One run says all that stands in the way."""
    write(here / "two.gguf", [*layer(0), *refused_layer(1), *layer(2)[:2], *refused_layer(3)], HEAD)
    for command in (
        "convert two.gguf o.gguf --strict",
        "convert two.gguf o.gguf --strict --dry-run",
    ):
        result = run(*command.split())
        assert result.code == 3
        assert re.search(r"qkv +1, 3 +type-mismatch", result.err)
        assert re.search(r"qkv +2 +missing-part", result.err)


def test_every_unknown_group_at_once(here: Path) -> None:
    result = run("convert", "in.gguf", "out.gguf", "--fuse", "rubbish,qkv,nonsense")
    assert "nonsense, rubbish" in result.err
    assert "gate_up" in result.err.splitlines()[-1]


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify in.gguf fused.gguf --values", "inspect in.gguf"])
def test_nothing_on_stderr(here: Path, command: str) -> None:
    """Not even numpy's warnings about infinite scales, which random blocks are full of."""
    done = child(*command.split())
    assert (done.returncode, done.stderr) == (0, "")


def on_terminal(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout (a pipe) and stderr (a terminal) of a process."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [*CLI, *map(str, args)], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not data:
            break
        seen += data
    os.close(ours)
    stdout, _ = process.communicate(timeout=20)
    return process.returncode, stdout.decode(), seen.decode(errors="replace")


@pytest.mark.parametrize(
    ("command", "verb"),
    [
        ("convert in.gguf out.gguf", "Fusing"),
        ("convert in.gguf out.gguf --json", "Fusing"),
        ("verify in.gguf fused.gguf", "Comparing"),
        ("unfuse fused.gguf out.gguf", "Un-fusing"),
        ("convert in.gguf out.gguf --quiet", ""),
        ("convert in.gguf out.gguf --dry-run", ""),
        ("unfuse fused.gguf out.gguf --quiet", ""),
    ],
)
def test_progress_on_a_terminal_only(here: Path, command: str, verb: str) -> None:
    code, out, err = on_terminal(*command.split())
    assert code == 0
    assert "\x1b" not in out
    if "--json" in command:
        json.loads(out)
    if not verb:
        assert err == ""
        return
    assert verb in err
    assert re.search(r"\d/[\d.]+ (kB|bytes|MB)", err), "bytes done and in all"
    assert re.search(r"\d:\d\d:\d\d|-:--:--", err), "time left"
    assert run(*command.replace("out.gguf", "again.gguf").split()).err == ""


def test_error_on_a_terminal(here: Path) -> None:
    code, out, err = on_terminal("inspect", "text.gguf")
    assert (code, out) == (4, "")
    assert err.startswith("Error: text.gguf: is not a GGUF file")
    assert "\x1b" not in err


READERS_GONE = [
    ("verify in.gguf fused.gguf", 4),
    ("verify in.gguf fused.gguf --json", 4),
    ("inspect in.gguf", 4),
]


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize(("command", "code"), READERS_GONE)
def test_reader_gone(here: Path, command: str, code: int) -> None:
    """`fuseweights verify … | head -1` must never look like a difference found."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*CLI, *command.split()], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# --- faults -----------------------------------------------------------------------------------


def test_traceback_only_on_demand(here: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FUSEWEIGHTS_DEBUG"}
    for value in (None, "0", "", "1"):
        given = environment if value is None else {**environment, "FUSEWEIGHTS_DEBUG": value}
        done = child("inspect", "text.gguf", env=given)
        assert ("Traceback" in done.stderr) == (value == "1")
        assert (done.returncode, done.stdout) == (4, ""), value


@pytest.mark.parametrize(
    "error",
    [RuntimeError(f"one\ntwo{ESCAPE}"), MemoryError(), OSError(5, "bad disk"), KeyError("x")],
)
def test_a_fault_is_one_line_too(here: Path, monkeypatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.delenv("FUSEWEIGHTS_DEBUG", raising=False)
    monkeypatch.setattr("fuseweights.api.inspect", fail)
    result = run("inspect", "in.gguf")
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("Error: ")
    assert all(c.isprintable() or c == "\n" for c in result.err)
    assert len(result.err.splitlines()) <= 2


# --- nothing from a file reaches the terminal raw ----------------------------------------------


COMPANION = [(f"blk.0.attn_q.{ESCAPE}", (8,), "F32", None), *layer(0)]
TENSOR = [(ESCAPE, (8,), "F32", None), *layer(0)]
SPOOFED = {
    "tensor": pack(TENSOR),
    "companion": pack(COMPANION),
    "architecture": pack(layer(0), architecture=ESCAPE),
    "key": pack(layer(0), [(ESCAPE, STRING, ESCAPE)]),
    "twice": pack([*TENSOR, TENSOR[0]]),
    "key twice": pack(layer(0), [(ESCAPE, STRING, "a"), (ESCAPE, STRING, "b")]),
    "key of no type": pack(layer(0), [(ESCAPE, U32, 1)]).replace(
        ESCAPE.encode() + b"\4\0\0\0", ESCAPE.encode() + b"\x63\0\0\0"
    ),
    "alignment": pack(layer(0), [("general.alignment", STRING, ESCAPE)]),
    "truncated": pack([(ESCAPE, (4096,), "F32", b"")]),
    "split": pack(layer(0), [("split.count", U32, 2), ("split.no", STRING, ESCAPE)]),
    "no manifest": pack(layer(0), [("fuseweights.manifest", STRING, f'{{"schema": "{ESCAPE}"}}')]),
}


def harmless(text: str) -> bool:
    """Only characters that print, and no line that the file made up."""
    lines = text.split("\n")
    return all(line.isprintable() and not line.startswith("Error: forged") for line in lines)


def assert_harmless(*extra: str) -> None:
    """Whatever is done with `spoof.gguf`."""
    try:
        fuseweights.inspect("spoof.gguf")
    except fuseweights.FuseweightsError as error:
        assert f"{error}{error.hint}".isprintable()
    for command in (
        ("inspect", "spoof.gguf"),
        ("inspect", "spoof.gguf", "--for", "torch"),
        ("convert", "spoof.gguf", "out.gguf", "--overwrite"),
        ("convert", "spoof.gguf", "out.gguf", "--strict", "--for", "torch", "--overwrite"),
        ("unfuse", "spoof.gguf", "out.gguf", "--overwrite"),
        ("verify", "in.gguf", "spoof.gguf"),
        ("verify", "spoof.gguf", "in.gguf"),
        ("verify", "spoof.gguf", "--source-sha256", "0" * 64),
    ):
        result = run(*command, *extra)
        assert result.code in range(5)
        assert harmless(result.out), command
        assert harmless(result.err), command
        if extra and result.out:
            json.loads(result.out)


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize("data", SPOOFED.values(), ids=SPOOFED)
def test_escapes_in_a_file(here: Path, data: bytes, extra: list[str]) -> None:
    Path("spoof.gguf").write_bytes(data)
    assert_harmless(*extra)


def leaves(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Where the strings of a JSON value lie, and what may become one."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    elif node is None or isinstance(node, str):
        yield path


def test_escapes_in_a_manifest(here: Path) -> None:
    """In each of its strings, with a checksum that is right."""
    write(here / "one.gguf", layer(0))
    fuseweights.convert("one.gguf", "one-fused.gguf")
    tensors = fuseweights.open_checkpoint("one-fused.gguf").tensors.values()
    rows = [(t.name, t.shape, t.dtype, None) for t in tensors]
    text = GGUFReader("one-fused.gguf").fields["fuseweights.manifest"].contents()
    places = [path for path in leaves(json.loads(text)) if path != ("sha256",)]
    assert len(places) > 5
    for *path, last in places:
        data = json.loads(text)
        del data["sha256"]
        reduce(getitem, path, data)[last] = ESCAPE
        compact = json.dumps(data, separators=(",", ":"))
        data["sha256"] = sha256(compact.encode()).hexdigest()
        compact = json.dumps(data, separators=(",", ":"))
        write(here / "spoof.gguf", rows, [("fuseweights.manifest", STRING, compact)])
        assert_harmless()


@pytest.mark.skipif(os.name == "nt", reason="such names are not allowed")
@pytest.mark.parametrize("name", [ESCAPE.replace("/", ""), "lone\udcffbyte", "a[red]b"])
def test_escapes_in_a_file_name(here: Path, name: str) -> None:
    bad, fused = here / f"{name}.gguf", here / f"{name}-fused.gguf"
    bad.write_bytes(Path("in.gguf").read_bytes())
    for command in (
        ("inspect", bad),
        ("convert", bad, fused),
        ("convert", bad, fused),
        ("convert", bad, "strict.gguf", "--strict"),
        ("inspect", fused),
        ("verify", bad, fused),
        ("verify", fused, "--source-sha256", "0" * 64),
        ("verify", fused, "--source-sha256", f"{name}={'0' * 64}"),
        ("verify", fused, "--source-sha256", name),
        ("unfuse", fused, f"{name}-back.gguf"),
        ("inspect", f"{name}-absent.gguf"),
        ("convert", bad, "out.gguf", "--for", name),
        ("convert", bad, "out.gguf", "--fuse", name),
    ):
        for extra in ([], ["--json"]):
            result = run(*command, *extra)
            assert result.code in range(5), (command, result.err)
            assert harmless(result.out), command
            assert harmless(result.err), command
            result.out.encode()
            result.err.encode()


# --- quick to start ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_an_example(command: str, flag: str) -> None:
    result = run(command, flag)
    assert (result.code, result.err) == (0, "")
    assert f"Example: fuseweights {command} " in " ".join(result.out.split())


def test_help_names_every_command() -> None:
    out = run("--help").out
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert run("--version").out == f"fuseweights {fuseweights.__version__}\n"


LISTED = """
import sys
from fuseweights import cli
try:
    cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
HEAVY = ("torch", "transformers", "triton", "vllm", "safetensors")


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("--help", (*HEAVY, "numpy", "gguf", "rich")),
        ("inspect in.gguf --json", (*HEAVY, "numpy", "gguf")),
        ("convert in.gguf out.gguf", (*HEAVY, "numpy", "gguf")),
        ("verify in.gguf fused.gguf", (*HEAVY, "numpy", "gguf")),
        ("verify in.gguf fused.gguf --values", HEAVY),
        ("unfuse fused.gguf out.gguf", (*HEAVY, "numpy", "gguf")),
    ],
)
def test_nothing_heavy_is_imported(here: Path, command: str, without: tuple[str, ...]) -> None:
    """Stand-ins on the path make sure that an import which is only tried shows as well."""
    for name in HEAVY[:4]:
        (here / "stand-ins" / name).mkdir(parents=True)
        (here / "stand-ins" / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", LISTED, *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here / "stand-ins"), *sys.path])},
        check=True,
    )
    assert not set(without) & set(done.stderr.split())


def test_import_of_the_package(here: Path) -> None:
    code = "import sys, fuseweights; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {*HEAVY, "numpy", "gguf", "typer", "rich"}
