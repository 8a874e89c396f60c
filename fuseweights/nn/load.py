"""Read a checkpoint straight into tensors, fused on the way: each is allocated once and filled
from the files, nothing is concatenated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from os import PathLike

import torch
from torch import Tensor, nn

from ..api import open_checkpoint
from ..checkpoint.model import Tensor as Stored
from ..checkpoint.pieces import Piece, Sources, Weave, piece_size, stream
from ..layout import read_manifest
from ..planner import decide
from .state import StateDictError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def load_state_dict(
    path: str | PathLike[str], *, fuse: bool = True, like: nn.Module | Mapping | None = None
) -> dict[str, Tensor]:
    """Every tensor of the checkpoint at `path`, by name, on the CPU.

    With `fuse` what stacks exactly comes as one tensor under its fused name; a checkpoint that is
    fused already comes as it is. Types that torch lacks (GGUF blocks) come as bytes, a row each.
    `like`, a model or its state dict, is what the keys must fit: StateDictError lists everything
    missing, extra, of another shape or dtype, before any tensor is read.
    """
    checkpoint = open_checkpoint(path)
    plan = {t.name: (t.dtype, t.shape, (t.bytes,)) for t in checkpoint.tensors.values()}
    if fuse and read_manifest(checkpoint) is None:
        for group in decide(checkpoint, "torch", None)[0]:
            for tensor in group.tensors:
                for part in tensor.parts:
                    del plan[part.name]
                plan[tensor.name] = (tensor.dtype, tensor.shape, tensor.pieces)
    if like is not None:
        shapes = {name: _empty(*row, device="meta") for name, row in plan.items()}
        check(shapes, like)
    with Sources(checkpoint.paths) as sources:
        return {name: _read(_empty(*row), row[2], sources) for name, row in plan.items()}


def load_into(model: nn.Module, source: str | PathLike[str] | Mapping[str, Tensor]) -> None:
    """Give `model` the tensors of a checkpoint or a state dict, which must fit it exactly.

    The tensors become the model's own (nothing is copied). StateDictError lists all that does not
    fit, and leaves the model as it was.
    """
    if not isinstance(source, Mapping):
        source = load_state_dict(source, like=model)
    else:
        check(source, model)
    wanted = model.state_dict(keep_vars=True)
    state = {name: source[_present(name, source, wanted)] for name in wanted}
    names = _tied(wanted)
    model.load_state_dict(state, assign=True)
    for name, others in names.items():
        if others and (first := min(name, *others)) != name:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


def check(state: Mapping[str, Tensor], like: nn.Module | Mapping) -> None:
    """Raises StateDictError with every key of `state` that is missing, extra or of another kind."""
    wanted = like.state_dict(keep_vars=True) if isinstance(like, nn.Module) else like
    problems = []
    for name, tensor in wanted.items():
        found = _present(name, state, wanted)
        if found is None:
            problems.append(f"{name} is missing, expected {_said(tensor)}")
        elif _said(state[found]) != _said(tensor):
            problems.append(f"{found} is {_said(state[found])}, expected {_said(tensor)}")
    problems += [f"{name} has no place" for name in state if name not in wanted]
    if problems:
        raise StateDictError(problems)


def _tied(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The other names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: [n for n in names[id(t)] if n != name] for name, t in state.items()}


def _present(name: str, state: Mapping, wanted: Mapping[str, Tensor]) -> str | None:
    """`name`, or another name of the same tensor, whichever `state` has."""
    if name in state:
        return name
    return next((n for n, t in wanted.items() if t is wanted[name] and n in state), None)


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_tensor(tensor: Stored, sources: Sources) -> Tensor:
    """A tensor of a checkpoint on the CPU; blocks as bytes, a row each."""
    pieces = (tensor.bytes,)
    return _read(_empty(tensor.dtype, tensor.shape, pieces), pieces, sources)


def _empty(
    dtype: str, shape: tuple[int, ...], pieces: Iterable[Piece], device: str = "cpu"
) -> Tensor:
    kind = DTYPES.get(dtype)
    if kind is None:  # as bytes: rows and the bytes of a row
        size = sum(map(piece_size, pieces))
        kind, shape = torch.uint8, (*shape[:-1], size // (prod(shape[:-1]) or 1))
    return torch.empty(shape, dtype=kind, device=device)


def _read(tensor: Tensor, pieces: Iterable[Piece], sources: Sources) -> Tensor:
    """Fill `tensor` from the files: runs of bytes go straight into it."""
    if not tensor.numel():
        return tensor
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    at = 0
    for piece in pieces:
        if isinstance(piece, Weave) and piece.rounds == 1:
            for file, offset, size, _ in piece.strands:
                sources.read_into(file, offset, view[at : at + size])
                at += size
            continue
        for chunk in stream((piece,), sources):
            view[at : at + len(chunk)] = chunk
            at += len(chunk)
    return tensor
