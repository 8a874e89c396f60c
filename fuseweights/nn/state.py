"""State dicts of modules that hold fused layers: fused or split, checked whole before any copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import FuseweightsError, UsageError


class StateDictError(FuseweightsError):
    """A state dict does not fit. `problems` has every reason; nothing was loaded."""

    def __init__(self, problems: list[str]):
        plural = "s" if len(problems) > 1 else ""
        super().__init__(f"{len(problems)} problem{plural}: " + "; ".join(problems))
        self.problems = tuple(problems)


def fused_tensors(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every fused tensor's name → its parts' names in a split checkpoint → their views."""
    out: dict[str, dict[str, Tensor]] = {}
    for path, child in module.named_modules():
        if not hasattr(child, "part_tensors"):
            continue
        # a fused layer's parts are its siblings, stacked experts' their children
        above = path.rpartition(".")[0] if hasattr(child, "sections") else path
        for part, (name, view) in child.part_tensors().items():
            out.setdefault(_join(path, name), {})[_join(above, part)] = view
    return out


def split_state(module: nn.Module) -> dict[str, Tensor]:
    """The un-fused state dict, fused tensors as their parts' views."""
    state, fused = module.state_dict(), fused_tensors(module)
    out = {}
    for name, tensor in state.items():
        out |= (
            {part: view.detach() for part, view in fused[name].items()}
            if name in fused
            else {name: tensor}
        )
    return out


@torch.no_grad()
def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict into `module` bit for bit. A fused tensor may come whole or as its parts.

    Missing, extra and doubled names, shapes and dtypes other than the module's are all reported in
    one StateDictError, before anything is copied.
    """
    fused, places, problems = fused_tensors(module), [], []
    wanted: set[str] = set()

    def place(name: str, tensor: Tensor) -> None:
        wanted.add(name)
        given = state.get(name)
        if tensor.is_meta:
            problems.append(f"{name} has no memory here yet (meta device)")
        elif given is None:
            problems.append(f"{name} is missing")
        elif given.shape != tensor.shape:
            problems.append(f"{name} has shape {list(given.shape)}, not {list(tensor.shape)}")
        elif given.dtype != tensor.dtype:
            problems.append(f"{name} is {_dtype(given)}, not {_dtype(tensor)}")
        else:
            places.append((tensor, given))

    for name, tensor in module.state_dict(keep_vars=True).items():
        parts = fused.get(name, {})
        if name not in state and any(part in state for part in parts):
            for part, view in parts.items():
                place(part, view)
            shared = [
                state[p]
                for p, v in parts.items()
                if v.data_ptr() == tensor.data_ptr() and v.shape == tensor.shape and p in state
            ]
            if any(not torch.equal(shared[0], other) for other in shared[1:]):
                problems.append(f"{name} is one for all its parts, and theirs differ")
        else:
            place(name, tensor)
            for part in parts:
                if part in state:
                    wanted.add(part)
                    problems.append(f"{part} is given beside {name}, which contains it")
    problems += [f"{name} has no place" for name in state if name not in wanted]
    if problems:
        raise StateDictError(problems)
    for tensor, given in places:
        tensor.copy_(given)


def check_nothing_lost(old: nn.Module, new: nn.Module) -> None:
    """`new` was made from `old`: refuse it if a tensor of the old one has no place in it."""
    lost = old.state_dict().keys() - new.state_dict().keys() - split_state(new).keys()
    if lost:
        ours, names = type(new).__name__, ", ".join(sorted(lost))
        raise UsageError(f"{type(old).__name__} has tensors that {ours} knows nothing of: {names}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
