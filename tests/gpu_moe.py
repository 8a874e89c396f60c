"""The experts' kernels on a GPU: are they right (`check`), how fast beside others (`rows`)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from fuseweights.kernels import moe, moe_grouped, router

E, TOP, H, I = 256, 8, 2048, 512  # Qwen3.5-35B-A3B  # noqa: E741
DEVICE = "cuda"


def made(experts: int, hidden: int, wide: int, shared: int, dtype: torch.dtype) -> dict[str, Any]:
    """Weights of a block, scaled so that activations stay near 1."""

    def randn(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(scale)

    block = {
        "router": randn(experts, hidden, scale=2 * hidden**-0.5),
        "gate_up": randn(experts, 2 * wide, hidden, scale=hidden**-0.5),
        "down": randn(experts, hidden, wide, scale=wide**-0.5),
        "shared_gate_up": None,
        "shared_down": None,
        "shared_gate": None,
    }
    if shared:
        block["shared_gate_up"] = randn(2 * shared, hidden, scale=hidden**-0.5)
        block["shared_down"] = randn(hidden, shared, scale=shared**-0.5)
        block["shared_gate"] = randn(1, hidden, scale=hidden**-0.5)
    return block


def exact(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def routes(kind: str, tokens: int, top: int, experts: int) -> torch.Tensor:
    """index [T, k]: drawn at random, all alike, or with the same expert again and again."""
    if kind == "random":
        rows = torch.rand(tokens, experts, device=DEVICE)
        return rows.topk(top, dim=1)[1]
    if kind == "one":
        return torch.arange(top, device=DEVICE).expand(tokens, top)
    return torch.randint(0, 3, (tokens, top), device=DEVICE)


#: A float32 tl.dot adds K products one after another: an error of about √K · eps / 2, where cuBLAS
#: may err less. Far below what rounding to 16 bits costs.
FLOAT32_SUM = 512**0.5 * torch.finfo(torch.float32).eps / 2


def wrong(name: str, ours: torch.Tensor, plain: torch.Tensor, right: torch.Tensor) -> list[str]:
    """Ours may err by 1.1 × what plain PyTorch errs by in that dtype."""
    error, allowed = gpu.error(ours, right), max(1.1 * gpu.error(plain, right), FLOAT32_SUM)
    return [] if error <= allowed else [f"{name}: error {error:.2e}, allowed {allowed:.2e}"]


def check_experts(
    dtype: torch.dtype, tokens: list[int], shape: tuple[int, ...], act: str = "silu"
) -> list[str]:
    experts, top, hidden, wide, shared = shape
    block, found = made(experts, hidden, wide, shared, dtype), []
    given = [block[n] for n in ("gate_up", "down")]
    folded = [block[n] for n in ("shared_gate_up", "shared_down")]
    doubles = [exact(t) for t in given], [exact(t) for t in folded]
    for count in tokens:
        for kind in ("random", "one", "repeated"):
            x = torch.randn(count, 2 * hidden, device=DEVICE, dtype=dtype)[:, :hidden]
            index = routes(kind, count, top, experts)
            scores = torch.rand(count, top, device=DEVICE, dtype=dtype)
            score = torch.rand(count, device=DEVICE, dtype=dtype) if shared else None
            right = moe.reference(
                x.double(), index, scores.double(), *doubles[0], act, *doubles[1], exact(score)
            )
            arguments = (x, index, scores, *given, act, *folded, score)
            plain = moe.reference(*arguments)
            for crossover in {0, moe.FEW_TOKENS} if count <= moe.FEW_TOKENS else {0}:
                usual, moe.FEW_TOKENS = moe.FEW_TOKENS, crossover
                try:
                    ours = moe.experts(*arguments)
                finally:
                    moe.FEW_TOKENS = usual
                name = f"experts {dtype} T={count} {kind} {shape} few={crossover}"
                found += wrong(name, ours, plain, right)
    return found


def clear_rows(weight: torch.Tensor, top: int, count: int) -> torch.Tensor:
    """Tokens whose choice of experts no rounding of the logits can change."""
    x = torch.randn(64 * count, weight.shape[1], device=DEVICE, dtype=weight.dtype)
    logits = (x.double() @ weight.double().T).sort(1, descending=True)[0]
    gap = logits[:, :top] - logits[:, 1 : top + 1]
    return x[gap[:, -1] > 0.05][:count].contiguous()


def check_block(dtype: torch.dtype, tokens: list[int], shape: tuple[int, ...]) -> list[str]:
    experts, top, hidden, wide, shared = shape
    block, found = made(experts, hidden, wide, shared, dtype), []
    pool = clear_rows(block["router"], top, max(tokens))
    parts = [block[n] for n in ("gate_up", "down")]
    folded = [block[n] for n in ("shared_gate_up", "shared_down", "shared_gate")]
    doubles = [exact(t) for t in (block["router"], *parts, *folded)]
    for count in tokens:
        for normalize in (True, False):
            x = pool[:count]
            right = moe.sparse_moe_reference(
                x.double(), doubles[0], top, normalize, *doubles[1:3], "silu", *doubles[3:]
            )
            arguments = (x, block["router"], top, normalize, *parts, "silu", *folded)
            plain = moe.sparse_moe_reference(*arguments)
            name = f"block {dtype} T={count} {shape}"
            found += wrong(name, moe.sparse_moe(*arguments), plain, right)
            chosen = router.router(x, block["router"], top, normalize, block["shared_gate"])
            plain = router.reference(x, block["router"], top, normalize, block["shared_gate"])
            if not torch.equal(chosen[2].sort(1)[0], plain[2].sort(1)[0]):
                found.append(f"router {dtype} T={count} {shape}: other experts")
    return found


class Block(torch.nn.Module):
    def __init__(self, block: dict[str, Any], top: int):
        super().__init__()
        self.block, self.top = block, top

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.block
        shared = b["shared_gate_up"], b["shared_down"], b["shared_gate"]
        return torch.ops.fuseweights.sparse_moe(
            x, b["router"], self.top, True, b["gate_up"], b["down"], "silu", *shared
        )


def check_overlap(tokens: int) -> list[str]:
    """A chain of blocks gives the same bits with and without dependent launches, from a CUDA graph
    and again from it: no kernel reads what another has yet to write, or writes what one reads."""
    blocks = [Block(made(64, 1024, 256, 256, torch.bfloat16), 8) for _ in range(6)]
    first = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        x = first
        for _ in range(4):
            for block in blocks:
                x = F.rms_norm(x + block(x), x.shape[-1:])
        return x

    modules, found = (moe, moe_grouped, router), []
    usual = moe.pdl
    for module in modules:
        module.pdl = lambda x: False
    try:
        alone = chain()
    finally:
        for module in modules:
            module.pdl = usual
    if not torch.equal(alone, chain()):
        found.append(f"T={tokens}: dependent launches change the result")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = chain()
    for turn in range(20):
        out.fill_(float("nan"))
        graph.replay()
        if not torch.equal(alone, out):
            return [*found, f"T={tokens}: replay {turn} differs"]
    compiled = torch.compile(blocks[0], fullgraph=True)
    if not torch.equal(compiled(first), blocks[0](first)):
        found.append(f"T={tokens}: torch.compile changes the result")
    return found


def check() -> list[str]:
    torch.manual_seed(0)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    some = [1, 2, 15, 63, 64, 65]
    found = check_experts(bf16, [*some, 1000], (64, 8, H, I, I))
    found += check_experts(bf16, [1, 40], (60, 6, 1408, 352, 704), "gelu_tanh")
    found += check_experts(fp16, [1, 15, 65], (16, 4, 512, 320, 320), "gelu")
    found += check_experts(fp32, [2, 33], (16, 4, 512, 256, 0))
    found += check_block(bf16, [1, 2, 4, 16, 17, 100], (E, TOP, H, I, I))
    found += check_block(fp16, [4, 20], (60, 6, 512, 256, 320))
    found += check_block(fp32, [4, 20], (16, 2, 512, 256, 0))
    for tokens in (1, 4, 24):
        found += check_overlap(tokens)
    empty = made(8, 64, 32, 32, bf16)
    if Block(empty, 2)(torch.empty(0, 64, device=DEVICE, dtype=bf16)).shape != (0, 64):
        found.append("no tokens: wrong shape")
    return found


# Timing


def plain_experts(block: dict, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor):
    """transformers' experts, eager: a loop over the experts that are hit."""
    out = torch.zeros_like(x)
    mask = F.one_hot(index, num_classes=len(block["down"])).permute(2, 1, 0)
    for (expert,) in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], block["gate_up"][expert]).chunk(2, -1)
        part = F.linear(F.silu(gate) * up, block["down"][expert])
        out.index_add_(0, token, part * scores[token, slot, None])
    return out


def batched_experts(block: dict, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor):
    """transformers' "batched_mm": gathers the chosen experts' weights."""
    tokens, k = index.shape
    flat = index.flatten()
    hidden = torch.bmm(block["gate_up"][flat], x.repeat_interleave(k, 0)[..., None])[..., 0]
    gate, up = hidden.chunk(2, -1)
    out = torch.bmm(block["down"][flat], (F.silu(gate) * up)[..., None])[..., 0]
    return (out * scores.flatten()[:, None]).view(tokens, k, -1).sum(1)


def grouped_experts(block: dict, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor):
    """transformers' "grouped_mm": sort, torch's grouped matrix product, unsort, sum."""
    tokens, k = index.shape
    expert, order = index.flatten().sort()
    count = torch.histc(expert.int(), bins=len(block["down"]), min=0, max=len(block["down"]) - 1)
    ends = count.cumsum(0, dtype=torch.int32)
    hidden = torch._grouped_mm(x[order // k], block["gate_up"].transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, block["down"].transpose(1, 2), offs=ends)
    out = out * scores.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, k, -1).sum(1)


def flag_gems_experts() -> tuple[str, Callable]:
    import logging
    from importlib.metadata import version

    logging.getLogger("flag_gems").setLevel(logging.ERROR)  # it warns at every call
    from flag_gems.fused.fused_moe import fused_experts_impl

    def call(block: dict, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor):
        return fused_experts_impl(x, block["gate_up"], block["down"], scores, index)

    return f"flag_gems {version('flag_gems')} fused_moe", call


def ours(block: dict, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor):
    return moe.experts(x, index, scores, block["gate_up"], block["down"])


def plain_block(block: dict, x: torch.Tensor, experts: Callable = batched_experts) -> torch.Tensor:
    """transformers' sparse block: router, experts, shared expert."""
    scores, index = F.linear(x, block["router"]).softmax(-1, dtype=torch.float32).topk(TOP)
    scores = (scores / scores.sum(-1, keepdim=True)).to(x.dtype)
    gate, up = F.linear(x, block["shared_gate_up"]).chunk(2, -1)
    shared = F.linear(F.silu(gate) * up, block["shared_down"])
    shared = torch.sigmoid(F.linear(x, block["shared_gate"])) * shared
    return experts(block, x, index, scores) + shared


def choices(tokens: int) -> list[tuple]:
    """(x, index, scores) again and again. Of one token: 32 sets that share no expert, 1.6 GB."""
    if tokens == 1:
        index = torch.randperm(E, device=DEVICE).view(-1, 1, TOP)
    else:
        index = [routes("random", tokens, TOP, E) for _ in range(8 if tokens <= 32 else 3)]
    x = torch.randn(tokens, H, device=DEVICE, dtype=torch.bfloat16)
    scores = torch.rand(tokens, TOP, device=DEVICE, dtype=torch.bfloat16)
    return [(x, i.contiguous(), scores) for i in index]


def eager_microseconds(call: Callable, rounds: int = 5) -> float:
    """For what waits for the host, and so cannot be captured."""
    call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[rounds // 2]


def graphed(call: Callable, block: dict, sets: list[tuple], launches: int) -> float:
    return gpu.microseconds(lambda given: call(block, *given), sets, launches=launches, rounds=5)


def bytes_moved(sets: list[tuple], shared: bool = False) -> int:
    """Chosen experts' weights, tokens in and out."""
    chosen = sum(len(index.unique()) for _, index, _ in sets) / len(sets)
    weights = (chosen + shared) * 3 * H * I + shared * (E + 1) * H
    return round(2 * (weights + 2 * len(sets[0][0]) * H))


def experts_row(block: dict, tokens: int) -> dict[str, Any]:
    sets = choices(tokens)
    launches = 256 if tokens == 1 else 24
    size = bytes_moved(sets)
    row = {
        "kernel": "moe experts",
        "shape": f"M={tokens}, {E} experts, top {TOP}, {H}, {I}",
        "bytes": size,
        "floor_us": size / 4.3e6,
        "ours_us": graphed(ours, block, sets, launches),
        "pytorch_us": eager_microseconds(lambda: plain_experts(block, *sets[0])),
    }
    other, name = batched_experts, "batched_mm"
    if tokens > 1:
        other, name = grouped_experts, "_grouped_mm"
    try:
        row["compiled_us"] = graphed(other, block, sets, launches)
        row["note"] = f"compiled: transformers' {name}, graphed"
    except Exception as problem:
        print("no", name, repr(problem)[:200])
    try:
        row["peer"], peer = flag_gems_experts()
        row["peer_us"] = graphed(peer, block, sets, launches)
    except Exception as problem:
        print("no flag_gems:", repr(problem)[:200])
    return row


def block_row(block: dict, tokens: int) -> dict[str, Any]:
    """The whole block; the router picks, so tokens are drawn anew for every call."""
    xs = [torch.randn(tokens, H, device=DEVICE, dtype=torch.bfloat16) for _ in range(32)]
    sets = [(x, router.reference(x, block["router"], TOP, True)[2], None) for x in xs]
    size = bytes_moved(sets, shared=True)
    shared = block["shared_gate_up"], block["shared_down"], block["shared_gate"]
    weights = block["gate_up"], block["down"], "silu", *shared
    launches = 256 if tokens == 1 else 32
    return {
        "kernel": "moe block (router, experts, shared)",
        "shape": f"M={tokens}, {E} experts, top {TOP}, {H}, {I}",
        "bytes": size,
        "floor_us": size / 4.3e6,
        "ours_us": gpu.microseconds(
            lambda x: moe.sparse_moe(x, block["router"], TOP, True, *weights), xs, launches
        ),
        "pytorch_us": eager_microseconds(lambda: plain_block(block, xs[0], plain_experts)),
        "compiled_us": gpu.microseconds(lambda x: plain_block(block, x), xs, launches),
        "note": "compiled: transformers' batched_mm, graphed",
    }


def rows(tokens: tuple[int, ...] = (1, 8, 32, 128, 512, 2048)) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    block = made(E, H, I, I, torch.bfloat16)
    out = [block_row(block, 1), *(experts_row(block, count) for count in tokens)]
    del block
    gc.collect()
    torch.cuda.empty_cache()
    return out
