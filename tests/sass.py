"""What the compiler makes of a kernel for a Hopper GPU, on a machine that has none.

`compiled(function)` runs `function`, which calls an operation's launcher with CPU tensors, and
returns one `Report` a kernel that it would have launched: the very specializations that a GPU would
get. Must run where TRITON_INTERPRET is not set: tests call `python tests/sass.py MODULE` instead
(`reports`), which prints what the cases in `MODULE.SASS` (name → function) compile to.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """One kernel: registers a thread, bytes of spills, shared memory (bytes), instructions by
    opcode (`FFMA`, `IDP.4A.S8.S8`, …), and how many global loads of each width in bits."""

    kernel: str
    registers: int
    spills: int
    shared: int
    warps: int
    opcodes: dict[str, int]
    loads: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


class _NoGPU:
    """A driver for a card that is not here: enough to compile, nothing to launch."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(function: Callable[[], Any]) -> list[Report]:
    import triton
    from fuseweights.kernels import launch

    found = []

    def compile_only(kernel: Any, grid: Any, *args: Any, pdl: bool = False, **meta: Any) -> None:
        # a GPU that runs these has dependent launch, so that is what is compiled
        binary = kernel.warmup(*args, grid=grid, PDL=True, launch_pdl=True, **meta)
        found.append(_report(binary))

    triton.runtime.driver.set_active(_NoGPU())
    modules = [m for n, m in sys.modules.items() if n.startswith("fuseweights.kernels.")]
    usual = launch.launch
    try:
        for module in modules:
            if getattr(module, "launch", None) is usual:
                module.launch = compile_only
        function()
    finally:
        for module in modules:
            if getattr(module, "launch", None) is compile_only:
                module.launch = usual
    return found


def _report(binary: Any) -> Report:
    tools = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()

        def ask(*flags: str) -> str:
            command = [tools / "cuobjdump", *flags, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, text = ask("-res-usage"), ask("-sass")
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", text, re.M)
    opcodes = Counter(name for name, _ in lines)
    loads: Counter[str] = Counter()
    for name, _ in lines:
        if name.startswith(("LDG.", "LDGSTS.")):  # not LDGDEPBAR, which waits
            width = re.search(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b", name)
            loads[next(filter(None, width.groups())) if width else "32"] += 1
    spilled = sum(n for name, n in opcodes.items() if name.startswith(("LDL", "STL")))
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Report(
        binary.metadata.name,
        numbers["REG"],
        numbers["STACK"] + spilled,
        binary.metadata.shared,
        binary.metadata.num_warps,
        dict(opcodes),
        dict(loads),
    )


def reports(module: str) -> dict[str, list[Report]]:
    """Case → what its kernels compile to, from a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, module], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads(done.stdout)
    return {name: [Report(**found) for found in kernels] for name, kernels in cases.items()}


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    cases = importlib.import_module(sys.argv[1]).SASS
    print(json.dumps({name: [asdict(r) for r in compiled(case)] for name, case in cases.items()}))
