"""The rooms of the house and the arrows between them, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fuseweights"
KERNELS = ROOT / "kernels"  # installed as fuseweights.kernels

# room: the rooms of ours that it may import. Data flows one way.
ARROWS = {
    "errors": set(),
    "rules": set(),
    "checkpoint": {"errors"},
    "manifest": {"checkpoint", "errors"},
    "candidates": {"checkpoint", "rules"},
    "merging": {"candidates", "checkpoint"},
    "guards": {"candidates", "checkpoint", "rules", "merging"},
    "planner": {
        *("candidates", "guards", "merging", "manifest", "checkpoint", "rules", "errors"),
    },
    "clone": {"checkpoint", "errors"},
    "layout": {
        *("planner", "merging", "candidates", "manifest", "clone", "checkpoint", "rules", "errors"),
    },
    "unfuser": {"layout", "planner", "candidates", "manifest", "checkpoint", "rules", "errors"},
    "target": {"planner", "checkpoint", "errors"},
    "writer": {"target", "planner", "checkpoint", "clone", "errors"},
    "dequantize": set(),
    # the proof shares nothing with what it proves: no layout, no unfuser, no writer
    "verifier": {"candidates", "manifest", "checkpoint", "rules", "planner", "dequantize"},
    "api": {
        *("layout", "planner", "unfuser", "writer", "verifier"),
        *("checkpoint", "rules", "errors"),
    },
    "kernels": set(),  # torch and triton only
    # torch from here on, but for the door
    "nn": {
        *("kernels", "api", "layout", "planner", "candidates", "manifest"),
        *("checkpoint", "rules", "errors"),
    },
    "report": {"api", "planner", "rules", "unfuser", "verifier", "errors"},
    "cli": {"api", "nn", "report", "errors"},
}


def room_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of ours that the file imports, at its top or inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    if path.is_relative_to(KERNELS):
        package = ("fuseweights", *package)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            base = tuple(part for part in base if part)
            names = [base, *((*base, alias.name) for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple((node.module or "").split("."))]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        rooms |= {name[1] for name in names if name[0] == "fuseweights" and len(name) > 1}
    return (rooms & {room_of(p) for p in FILES}) - {"__init__"}


FILES = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
OPTIONAL_PEERS = {"fla"}  # imported where it is installed, and only when it is asked for
MODULES = [p for p in FILES if room_of(p) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows(path):
    room = room_of(path)
    assert room in ARROWS, f"a new room: say in ARROWS what {room} may import"
    assert imports(path) - {room} <= ARROWS[room]


def test_there_are_no_circles():
    """Each room imports only rooms above it in the table."""
    seen: set[str] = set()
    for room in ARROWS:
        back = ARROWS[room] - seen
        assert not back, f"{room} imports {back}, which stand above it"
        seen.add(room)


@pytest.mark.parametrize("path", [*KERNELS.rglob("*.py")], ids=lambda p: p.name)
def test_kernels_need_torch_and_triton_only(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    assert names <= sys.stdlib_module_names | {"torch", "triton"} | OPTIONAL_PEERS


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("torch", "transformers", "numpy", "gguf", "safetensors", "distributed")


@pytest.mark.parametrize("what", ["import fuseweights", "import fuseweights.cli"])
def test_importing_is_light(what):
    assert run(f"import sys; {what}; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


def test_planning_needs_no_heavy_library_either():
    """Nor converting: numpy comes in only for tensors whose runs are short."""
    example = ROOT / "examples" / "tiny-llama-q4_k_m.gguf"
    code = f"import sys, fuseweights; fuseweights.plan({str(example)!r})"
    assert run(f"{code}; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


def test_kernels_are_a_package_of_ours_and_never_the_other_one():
    assert run("import fuseweights.kernels as k; print(k.__name__)") == "fuseweights.kernels\n"
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert "import fuseweights.kernels" in done.stderr


def test_nothing_speaks_of_one_machine():
    """Tracked text names no home, no absolute path of whoever wrote it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in tracked.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml") and path.name != "test_house.py":
            text = path.read_text()
            assert not any(word in text for word in ("/root/", "/home/", "/Users/")), name
