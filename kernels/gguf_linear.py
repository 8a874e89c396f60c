"""y = x·Wᵀ for W as the blocks a GGUF file has, and what fuses with it.

`gguf_linear` takes x in floating point. Up to MATVEC rows of it, W is read as it is stored
(gguf_vector.py, gguf_matrix.py): x is quantized to Q8_1 (quantize.py; llama.cpp multiplies in the
same way), or, `exact`, W is dequantized in registers and multiplied in float32. More rows: W is
dequantized into a buffer, WORKSPACE bytes of it at a time, and multiplied by cuBLAS.
`gguf_linear_q8_1` takes activations that a norm has quantized already. Blocks may be raw or planar
(gguf_types.py); planar reads faster where has_planar.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated_mlp import ACTIVATIONS, gated
from .gguf_blocks import DECODERS
from .gguf_dequantize import dequantize_kernel
from .gguf_matrix import matrix_kernel
from .gguf_types import TYPES, block_type
from .gguf_types import dequantize as dequantize_reference
from .gguf_vector import vector_kernel
from .launch import INTERPRETED, check, launch, pdl, register
from .linear import rows_of
from .quantize import quantize_q8_1

#: Rows of x that read W as it is stored.
MATVEC = 32
#: Columns of the result that vector_kernel makes of one reading of W.
COLUMNS = 4
#: Bytes of dequantized weights that are multiplied at once.
WORKSPACE = 256 << 20
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Q8_1 = tuple[Tensor, Tensor, Tensor]


class Vector(NamedTuple):
    """vector_kernel: rows of W (of each half where they are gated) a tile, warps a program,
    programs a multiprocessor that loop over all tiles (0: one for every tile)."""

    rows: int = 1
    warps: int = 1
    programs: int = 0


class Matrix(NamedTuple):
    """matrix_kernel: rows of W (of each half where they are gated) a program, warps that share
    them, 256 · span weights at a time, and whether they load a step ahead."""

    rows: int = 16
    warps: int = 4
    span: int = 1
    ahead: bool = True


#: Programs of vector_kernel, each a warp, that a multiprocessor's registers hold; gated ones.
RESIDENT = {
    **{2: (28, 20), 3: (28, 16), 6: (28, 16), 7: (24, 16), 8: (19, 16), 10: (28, 20)},
    **{11: (20, 16), 12: (20, 16), 13: (16, 12), 14: (20, 16), 20: (28, 20), 23: (20, 16)},
    39: (28, 15),
}


def config(type: int, n: int, k: int, m: int, gated: bool) -> Vector | Matrix:
    """What was fastest on an H200 for out [m, n] of k columns of W (of all experts together). One
    wave of vector programs: each has what it can hold in registers, as few warps as that allows."""
    kind, groups = TYPES[type], DECODERS[type].groups
    if m > 2:
        rows = 16 if gated else 32
        if n < 8192:  # more programs than multiprocessors
            return Matrix(rows=16, warps=8 if k <= 8192 else 4)
        return Matrix(rows, warps=2) if kind.name == "Q8_0" else Matrix(rows, ahead=False)
    unit = groups * (10 + 16 * kind.bytes / kind.weights)  # registers: activations, two loads
    warps = 1
    while -(-k // (1024 * groups * warps)) * unit > 110:
        warps *= 2
    programs = RESIDENT[type][gated] * (3 if m == 2 else 4) // 4
    return Vector(1, warps, max(1, programs // warps))


def _meta(blocks: Tensor, type: int, columns: int, planar: bool) -> dict[str, Any]:
    aligned = blocks.is_contiguous() and blocks.data_ptr() % 16 == 0
    check(aligned, "blocks: expected contiguous, on a multiple of 16 bytes")
    decoder, kind = DECODERS[type], block_type(type)
    return {
        "LOAD": decoder.load,
        "UNPACK": decoder.unpack,
        "PLACES": kind.places(columns, planar),
        "TRAITS": decoder.traits,
        "ROW_BYTES": kind.row_bytes(columns, planar),
        "K": columns,
    }


def multiply(
    x: Tensor | Q8_1,
    blocks: Tensor,
    out: Tensor,
    type: int,
    planar: bool,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    index: Tensor | None = None,
    scores: Tensor | None = None,
    how: Vector | Matrix | None = None,
) -> Tensor:
    """out [rows, N] from x [M, K], floating point (exact) or quantized, by one of the kernels. All
    checked by the callers; `index` and `scores` as vector_kernel says."""
    exact = isinstance(x, Tensor)
    q, d, s = (x, None, None) if exact else x
    k, (m, n) = q.shape[1], out.shape
    slots = 0 if index is None else index.shape[1]
    top = slots if scores is not None else 1
    units = k * top // (32 * DECODERS[type].groups)
    how = how or config(type, n, k * top, 1 if exact or slots else m, act is not None)
    stride = 0 if residual is None else residual.stride(0)
    meta = _meta(blocks, type, k, planar) | {"ACT": act, "num_warps": how.warps, "pdl": pdl(q)}
    if isinstance(how, Matrix):
        columns, warps = 16 if m > 8 else 8, 1 if INTERPRETED else how.warps
        span = how.span * 256 // block_type(type).weights
        launch(
            matrix_kernel, (-(-n // how.rows), -(-m // columns)), blocks, q, d, s, bias, residual,
            out, n, m, stride, COLUMNS=columns, ROWS=how.rows, SPAN=span, WARPS=warps,
            AHEAD=how.ahead, **meta,
        )  # fmt: skip
        return out
    columns = 1 if slots else min(COLUMNS, m)
    # interpreted, a vector costs as much as a number
    lanes = 1 << (units - 1).bit_length() if INTERPRETED else 32 * how.warps
    programs = -(-n // how.rows)
    if how.programs:
        programs = min(programs, -(-132 * how.programs // -(-m // columns)))
    launch(
        vector_kernel, (programs, -(-m // columns)), blocks, q, d, s, bias, residual,
        index, scores, out, n, m, q.stride(0), stride, EXACT=exact, SLOTS=slots, TOP=top,
        COLUMNS=columns, ROWS=how.rows, LANES=lanes, LOOP=how.programs > 0, **meta,
    )  # fmt: skip
    return out


def refuse_blocks(blocks: Tensor, type: int, columns: int, planar: bool, ndim: int = 2) -> None:
    size = block_type(type).row_bytes(columns, planar)
    name = f"{TYPES[type].name}, {'planar' if planar else 'raw'}, {columns} columns"
    shape = ["N", "E, N"][ndim - 2]
    check(
        blocks.dtype == torch.uint8 and blocks.ndim == ndim and blocks.shape[-1] == size,
        f"blocks: {name}: expected uint8 [{shape}, {size}], "
        f"found {blocks.dtype} {list(blocks.shape)}",
    )


def _refuse(
    shape: tuple[int, ...],
    device: torch.device,
    blocks: Tensor,
    type: int,
    planar: bool,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[int, ...]:
    """Whatever gguf_linear does not take; else the result's shape. `shape`: x's."""
    check(len(shape) > 0, "x: expected [..., K], found a scalar")
    refuse_blocks(blocks, type, shape[-1], planar)
    n = blocks.shape[0]
    check(act is None or act in ACTIVATIONS, f"act: expected {list(ACTIVATIONS)}, found {act}")
    check(act is None or n % 2 == 0, f"blocks: expected 2I rows for {act}, found {n}")
    out = (*shape[:-1], n // 2 if act else n)
    for name, tensor, expected in (("bias", bias, (n,)), ("residual", residual, out)):
        if tensor is not None:
            found = list(tensor.shape)
            check(found == list(expected), f"{name}: expected {list(expected)}, found {found}")
            check(tensor.is_floating_point(), f"{name}: expected floats, found {tensor.dtype}")
    for name, tensor in (("blocks", blocks), ("bias", bias), ("residual", residual)):
        if tensor is not None:
            check(tensor.device == device, f"{name}: expected on {device}, not {tensor.device}")
    return out


def _epilogue(
    y: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if bias is not None:
        y = y + bias
    if act is not None:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[act](gate) * up
    return (y if residual is None else y + residual).to(dtype)


def linear_reference(
    x: Tensor,
    blocks: Tensor,
    type: int,
    planar: bool = False,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Computed in float32 (float64 where x is), rounded once."""
    if type in TYPES:
        _refuse(x.shape, x.device, blocks, type, planar, bias, act, residual)
        weight = dequantize_reference(blocks, type, x.shape[-1], planar)
    else:
        weight = _other_type(blocks, type)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _epilogue(F.linear(x.to(wide), weight.to(wide)), bias, act, residual, x.dtype)


_warned: set[int] = set()


def _other_type(blocks: Tensor, type: int) -> Tensor:
    """float32 weights of a type that has no kernel, by gguf-py (fuseweights.nn.weights)."""
    fallback = getattr(torch.ops.fuseweights, "dequantize_gguf", None)
    check(fallback is not None, f"ggml type {type}: no kernels, and fuseweights.nn not imported")
    if type not in _warned:
        _warned.add(type)
        warnings.warn(
            f"ggml type {type} has no kernels: its weights are dequantized on every call",
            stacklevel=3,
        )
    return fallback(blocks, type)


def linear_cuda(
    x: Tensor,
    blocks: Tensor,
    type: int,
    planar: bool = False,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    if type not in TYPES or x.dtype not in FLOATS:
        return linear_reference(x, blocks, type, planar, bias, act, residual, exact)
    shape = _refuse(x.shape, x.device, blocks, type, planar, bias, act, residual)
    out = x.new_empty(shape)
    if not out.numel():
        return out
    rows = rows_of(x)
    if len(rows) > MATVEC:
        dtype = torch.float32 if exact else x.dtype
        y = _prefill(rows, blocks, type, planar, dtype)
        if act is not None and bias is None and residual is None:
            return gated(y, act).view(shape)
        residual = residual if residual is None else residual.reshape(out.flatten(0, -2).shape)
        return _epilogue(y, bias, act, residual, x.dtype).view(shape)
    given = rows if exact else quantize_q8_1(rows)
    residual = residual if residual is None else rows_of(residual)
    multiply(given, blocks, out.view(-1, shape[-1]), type, planar, bias, act, residual)
    return out


def _linear_fake(x, blocks, type, planar=False, bias=None, act=None, residual=None, exact=False):
    if type in TYPES:
        return x.new_empty(_refuse(x.shape, x.device, blocks, type, planar, bias, act, residual))
    return x.new_empty(*x.shape[:-1], blocks.shape[0] // (2 if act else 1))


#: gguf_linear(x [..., K], blocks [N or, with `act`, 2N, bytes a row], ggml type) → [..., N] in x's
#: dtype: residual + act(x·Wgᵀ + bg) · (x·Wuᵀ + bu), or residual + x·Wᵀ + b, any number of rows,
#: rounded once up to MATVEC of them. act: silu, gelu, gelu_tanh. A type without a kernel is
#: dequantized, with a warning. Raises KernelError for shapes, dtypes or devices that do not fit.
gguf_linear = register(
    "gguf_linear(Tensor x, Tensor blocks, int type, bool planar=False, Tensor? bias=None, "
    "str? act=None, Tensor? residual=None, bool exact=False) -> Tensor",
    cuda=linear_cuda,
    cpu=linear_reference,
    fake=_linear_fake,
)


def _refuse_q8_1(q: Tensor, d: Tensor, s: Tensor) -> None:
    check(q.dtype == torch.int8, f"q: expected int8, found {q.dtype}")
    groups = [*q.shape[:-1], q.shape[-1] // 32]
    for name, tensor in (("d", d), ("s", s)):
        found = f"{tensor.dtype} {list(tensor.shape)}"
        right = tensor.dtype == torch.float32 and list(tensor.shape) == groups
        check(right, f"{name}: expected float32 {groups}, found {found}")
        check(tensor.device == q.device, f"{name}: expected on {q.device}, not {tensor.device}")


def _dequantized_q8_1(q: Tensor, d: Tensor) -> Tensor:
    return (q.unflatten(-1, (-1, 32)) * d[..., None]).flatten(-2)


def q8_1_reference(
    q: Tensor,
    d: Tensor,
    s: Tensor,
    blocks: Tensor,
    type: int,
    dtype: torch.dtype,
    planar: bool = False,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    _refuse_q8_1(q, d, s)
    _refuse(q.shape, q.device, blocks, type, planar, bias, act, residual)
    x = _dequantized_q8_1(q, d)
    return linear_reference(x, blocks, type, planar, bias, act, residual).to(dtype)


def q8_1_cuda(
    q: Tensor,
    d: Tensor,
    s: Tensor,
    blocks: Tensor,
    type: int,
    dtype: torch.dtype,
    planar: bool = False,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    _refuse_q8_1(q, d, s)
    shape = _refuse(q.shape, q.device, blocks, type, planar, bias, act, residual)
    check(dtype in FLOATS, f"dtype: expected float32, float16 or bfloat16, found {dtype}")
    out = q.new_empty(shape, dtype=dtype)
    if not out.numel():
        return out
    if out.numel() > MATVEC * shape[-1]:
        x = _dequantized_q8_1(q, d).to(dtype)
        return linear_cuda(x, blocks, type, planar, bias, act, residual)
    given = tuple(t.reshape(-1, t.shape[-1]).contiguous() for t in (q, d, s))
    residual = residual if residual is None else rows_of(residual)
    multiply(given, blocks, out.view(-1, shape[-1]), type, planar, bias, act, residual)
    return out


def _q8_1_fake(q, d, s, blocks, type, dtype, planar=False, bias=None, act=None, residual=None):
    _refuse_q8_1(q, d, s)
    shape = _refuse(q.shape, q.device, blocks, type, planar, bias, act, residual)
    return q.new_empty(shape, dtype=dtype)


#: gguf_linear of activations that are quantized already: q int8 [..., K], d and s float32
#: [..., K / 32] as quantize.py has them → [..., N] in `dtype`. Meant for at most MATVEC rows.
gguf_linear_q8_1 = register(
    "gguf_linear_q8_1(Tensor q, Tensor d, Tensor s, Tensor blocks, int type, ScalarType dtype, "
    "bool planar=False, Tensor? bias=None, str? act=None, Tensor? residual=None) -> Tensor",
    cuda=q8_1_cuda,
    cpu=q8_1_reference,
    fake=_q8_1_fake,
)


def dequantize_cuda(
    blocks: Tensor, type: int, columns: int, dtype: torch.dtype, planar: bool = False
) -> Tensor:
    refuse_blocks(blocks, type, columns, planar, blocks.ndim)
    check(dtype in FLOATS, f"dtype: expected float32, float16 or bfloat16, found {dtype}")
    out = blocks.new_empty(*blocks.shape[:-1], columns, dtype=dtype)
    units = columns // (32 * DECODERS[type].groups)
    lanes = min(64, 1 << (units - 1).bit_length())
    rows = out.numel() // columns
    launch(
        dequantize_kernel, (rows, -(-units // lanes)), blocks, out, LANES=lanes,
        num_warps=max(1, lanes // 32), pdl=pdl(out), **_meta(blocks, type, columns, planar),
    )  # fmt: skip
    return out


def _prefill(x: Tensor, blocks: Tensor, type: int, planar: bool, dtype: torch.dtype) -> Tensor:
    """x·Wᵀ with W dequantized to `dtype`, WORKSPACE bytes at a time."""
    rows = max(256, WORKSPACE // (x.shape[1] * dtype.itemsize) // 256 * 256)
    x, out = x.to(dtype), x.new_empty(x.shape[0], blocks.shape[0], dtype=dtype)
    for first in range(0, blocks.shape[0], rows):
        some = blocks[first : first + rows]
        weight = dequantize_cuda(some, type, x.shape[1], dtype, planar)
        torch.mm(x, weight.T, out=out[:, first : first + rows])
    return out


#: gguf_dequantize(blocks [..., N, bytes a row], ggml type, columns, dtype) → weights
#: [..., N, columns]; float32 is bit for bit gguf-py's.
gguf_dequantize = register(
    "gguf_dequantize(Tensor blocks, int type, int columns, ScalarType dtype, bool planar=False) "
    "-> Tensor",
    cuda=dequantize_cuda,
    cpu=lambda blocks, type, columns, dtype, planar=False: dequantize_reference(
        blocks, type, columns, planar
    ).to(dtype),
    fake=lambda blocks, type, columns, dtype, planar=False: blocks.new_empty(
        *blocks.shape[:-1], columns, dtype=dtype
    ),
)
