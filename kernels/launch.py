"""How every kernel here is written, launched and registered.

An operation is one file: its plain PyTorch reference, its Triton kernels, a function that launches
them, and `register(...)`, which makes it `torch.ops.fuseweights.<name>`: CUDA tensors go to Triton,
CPU tensors to the reference, fake tensors to a function that only makes shapes.

Where triton is not installed (macOS, Windows, a converter-only machine) the files still import,
and only their references run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no GPU here, or no wheel for this system
    triton = tl = None

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


#: Kernels run in Python, on CPU tensors: how the tests run where there is no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_LIBRARY = torch.library.Library("fuseweights", "FRAGMENT")


class KernelError(ValueError):
    """Tensors that an operation does not take: which, what was expected, what was found."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


def register(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define `torch.ops.fuseweights.<name>` and return it. `schema` is torch.library's:
    "name(Tensor x, float eps) -> Tensor", with (a!) where an argument is written."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fuseweights::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fuseweights, name).default


def pdl(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device may start before the one before them has ended
    (programmatic dependent launch, compute capability 9.0): they then load what no kernel writes
    (weights), and call `wait_for_previous` before they touch anything else."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


@jit
def wait_for_previous(PDL: tl.constexpr):
    """Everything that earlier kernels wrote can be read from here on, and what they read may be
    written. Every kernel launched with launch_pdl must call it, in every program, or the kernel
    after the next could start before the one before this has ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def start_next(PDL: tl.constexpr):
    """The next kernel may start its programs: a hint, best given once this one's loads are out."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, pdl: bool = False, **meta: Any) -> Any:
    """Run `kernel` over `grid`, unless the grid is empty. With `pdl` the kernel gets PDL=True, and
    the launch attribute that it needs. `meta`: constexprs, num_warps, num_stages."""
    if 0 in grid:
        return None
    if INTERPRETED:
        meta.pop("maxnreg", None)
        return kernel[grid](*args, PDL=False, **meta)
    device = next(arg.get_device() for arg in args if isinstance(arg, torch.Tensor))
    if device != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(device):
            return kernel[grid](*args, PDL=pdl, launch_pdl=pdl, **meta)
    return kernel[grid](*args, PDL=pdl, launch_pdl=pdl, **meta)
