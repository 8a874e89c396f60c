"""What each process of a tensor parallel test runs; importable by name, as spawning needs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from nn_models import build, distance, swap
from torch.distributed.device_mesh import init_device_mesh


def run(rank: int, world: int, file: str, task: str, *args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        globals()[task](rank, world, init_device_mesh("cpu", (world,)), *args)
    finally:
        dist.destroy_process_group()


def whole_model(rank: int, world: int, mesh, family: str, changes: dict) -> None:
    """Prefill and decode of a sharded model equal the unsharded one's; weights shrink."""
    from transformers import DynamicCache

    from fuseweights.nn.parallel import parallelize

    ours, _ = swap(build(family, **changes))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))

    def logits(model):
        cache = DynamicCache(config=model.config)
        sizes, out, start = (6, 1, 2), [], 0
        for n in sizes:
            out.append(model(ids[:, start : start + n], past_key_values=cache).logits)
            start += n
        return torch.cat(out, 1)

    with torch.no_grad():
        want = logits(ours)
        sharded = parallelize(ours, mesh)
        assert distance(logits(sharded), want) <= 1e-12


def fused_linear(rank: int, world: int, mesh) -> None:
    """torch's own parallelize_module with our style, 8 query heads on 2 key heads."""
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    from fuseweights.nn import FusedAttention
    from fuseweights.nn.parallel import SectionwiseParallel

    torch.manual_seed(0)
    attention = FusedAttention(64, 8, 2, 8, bias=True, out_bias=True, rope=None).double()
    torch.nn.init.normal_(attention.qkv_proj.bias)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    with torch.no_grad():
        want, _ = attention(x)
        plan = {"qkv_proj": SectionwiseParallel(), "o_proj": RowwiseParallel()}
        parallelize_module(attention, mesh, plan)
        kv = 16 // min(world, 2)
        assert attention.qkv_proj.rows == [64 // world, kv, kv]
        assert attention.num_key_value_groups == 8 // world // (kv // 8)
        assert distance(attention(x)[0], want) <= 1e-12


def refused(rank: int, world: int, mesh) -> None:
    """Nothing is changed where something cannot be divided."""
    import pytest

    from fuseweights.errors import UsageError
    from fuseweights.nn.parallel import parallelize

    ours, _ = swap(build("olmo2"))
    before = [parameter.shape for parameter in ours.parameters()]
    with pytest.raises(UsageError, match="a norm over all heads"):
        parallelize(ours, mesh)
    assert [parameter.shape for parameter in ours.parameters()] == before
