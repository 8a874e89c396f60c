"""Tensor parallelism: every process keeps its share of every section, outputs are summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from ..errors import UsageError
from .attention import FusedAttention
from .delta_net import GatedDeltaNet
from .linear import FusedLinear, Section
from .mlp import GatedMLP
from .moe import Experts


class SectionwiseParallel(ParallelStyle):
    """For torch.distributed's `parallelize_module`, where a FusedLinear would be ColwiseParallel:
    a process gets its share of each section, not of the whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FusedLinear):
            raise UsageError(f"SectionwiseParallel is for FusedLinear, not {type(module).__name__}")
        local = module.shard(device_mesh.get_local_rank(), device_mesh.size())
        module.sections, module.format, module.names = local.sections, local.format, local.names
        for name, parameter in local.named_parameters():
            old = getattr(module, name, None)
            parameter.requires_grad_(old is not None and old.requires_grad)
            module.register_parameter(name, parameter)
        return module


def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard all of our modules in `module`, in place, over a one-dimensional mesh: their inputs
    and outputs stay whole. What cannot be divided is refused before anything is changed."""
    rank, world = mesh.get_local_rank(), mesh.size()
    ours = [m for m in module.modules() if isinstance(m, tuple(_SHARD))]
    for child in ours:
        _check(child, rank, world)
    for child in ours:
        _SHARD[type(child)](child, mesh)
    return module


def _check(module: nn.Module, rank: int, world: int) -> None:
    for child in module.children():
        if isinstance(child, FusedLinear):
            for sections in child.sections.values():
                for section in sections:
                    section.share(rank, world)
    if isinstance(module, GatedDeltaNet) and module.layout == "tiled":
        raise UsageError("tiled value heads do not divide into contiguous shares")
    if isinstance(module, Experts):
        Section(module.down_proj.shape[2]).share(rank, world)
    if isinstance(module, FusedAttention):
        norms = [n for n in (module.q_norm, module.k_norm) if n is not None]
        if any(norm.size != module.head_dim for norm in norms):
            raise UsageError("a norm over all heads cannot be computed from some of them")


def _plan(module: nn.Module, mesh: DeviceMesh, out: str | None) -> None:
    plan = {
        name: SectionwiseParallel()
        for name, child in module.named_children()
        if isinstance(child, FusedLinear)
    }
    parallelize_module(module, mesh, plan | ({out: RowwiseParallel()} if out else {}))


def _share(tensor: Tensor, sections: list[Section], mesh: DeviceMesh, dim: int = 0) -> nn.Parameter:
    """A process's share of a tensor whose `dim` consists of these sections."""
    pieces = []
    for section, part in zip(sections, tensor.split([s.rows for s in sections], dim), strict=True):
        (first, last), _ = section.share(mesh.get_local_rank(), mesh.size())
        pieces.append(part.narrow(dim, first, last - first))
    return nn.Parameter(torch.cat(pieces, dim).detach(), requires_grad=tensor.requires_grad)


def _mlp(mlp: GatedMLP, mesh: DeviceMesh) -> None:
    _plan(mlp, mesh, "down_proj")


def _attention(attention: FusedAttention, mesh: DeviceMesh) -> None:
    if attention.sinks is not None:
        heads = attention.sinks.shape[0]
        attention.sinks = _share(attention.sinks, [Section(heads)], mesh)
    _plan(attention, mesh, attention.out_name)


def _delta_net(mixer: GatedDeltaNet, mesh: DeviceMesh) -> None:
    nk, nv, world = mixer.key_heads, mixer.value_heads, mesh.size()
    keys, values = Section(nk * mixer.key_dim, nk), Section(nv * mixer.value_dim, nv)
    conv = mixer.conv1d
    conv.weight = _share(conv.weight, [keys, keys, values], mesh)
    conv.in_channels = conv.out_channels = conv.groups = conv.weight.shape[0]
    mixer.A_log = _share(mixer.A_log, [Section(nv)], mesh)
    mixer.dt_bias = _share(mixer.dt_bias, [Section(nv)], mesh)
    mixer.key_heads, mixer.value_heads = nk // world, nv // world
    _plan(mixer, mesh, "out_proj")


def _experts(experts: Experts, mesh: DeviceMesh) -> None:
    inner = Section(experts.down_proj.shape[2])
    experts.gate_up_proj = _share(experts.gate_up_proj, [inner, inner], mesh, dim=1)
    experts.down_proj = _share(experts.down_proj, [inner], mesh, dim=2)
    experts.register_forward_hook(lambda module, args, out: all_reduce(out, "sum", mesh))


_SHARD = {
    GatedMLP: _mlp,
    FusedAttention: _attention,
    GatedDeltaNet: _delta_net,
    Experts: _experts,
}
