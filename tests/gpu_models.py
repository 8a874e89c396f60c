"""Whole models with random weights on a GPU: stock transformers and the Decoder, one process.

`measure(name)` builds the model on the GPU, times batch 1 decoding three ways (stock eager, stock
with a static cache under torch.compile(mode="reduce-overhead"), the Decoder), counts the kernels of
a token, and compares logits with a float32 computation of the same bfloat16 weights; `check` does
that with small models. benchmarks/bench_models.py calls both.
"""

from __future__ import annotations

import copy
import gc
import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu import error
from torch import Tensor, nn

from fuseweights.nn import Decoder

#: transformers configuration class, and the sizes of Qwen3-8B and Qwen3.5-35B-A3B
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-8B": (
        "Qwen3Config",
        {
            "num_hidden_layers": 36,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "Qwen3.5-35B-A3B": (
        "Qwen3_5MoeTextConfig",
        {
            "num_hidden_layers": 40,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248320,
        },
    ),
}
PROMPT, CHECKED, LENGTH = 64, 8, 1024
#: Families with every kind of layer that the Decoder knows.
SMALL = ("llama_bias", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "gemma2", "gemma3_text")
#: Parameters whose product a layer adds to the residual.
BRANCHES = ("o_proj", "out_proj", "down_proj")


def build(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """The model on the GPU, every weight random. Embeddings of size 1 and branches that add up to
    about as much: rounding errors then stay what they are in a trained model, where with branches
    of size 1 a layer multiplies them, and 40 layers leave noise."""
    import transformers

    kind, sizes = SHAPES[name]
    config = getattr(transformers, kind)(**{**sizes, "tie_word_embeddings": False, **changes})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for which, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = 1.0 if "embed" in which else parameter.shape[-1] ** -0.5
                if which.removesuffix(".weight").endswith(BRANCHES):
                    std *= (2 * config.num_hidden_layers) ** -0.5
                parameter.normal_(std=std, generator=generator)
            else:
                noise = torch.empty_like(parameter).normal_(std=0.1, generator=generator)
                parameter.add_(noise)
    return model.eval()


def touched(model: nn.Module) -> int:
    """Bytes of weights that one token reads: all but the embedding and the experts not chosen."""
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.itemsize
        if ".experts." in name:
            size = size * model.config.num_experts_per_tok // model.config.num_experts
        total += 0 if "embed_tokens" in name else size
    return total


class _Wide(nn.Module):
    """A decoder layer computed in float32, its weights widened only while it runs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return copy.deepcopy(self.layer).float()(*args, **kwargs)


@torch.no_grad()
def truth(model: nn.Module, ids: Tensor, last: int) -> Tensor:
    """Logits [last, vocabulary] of the last tokens of ids [1, T], computed in float32."""
    text, head = model.get_decoder(), model.get_output_embeddings()
    kept = text.layers
    text.layers = nn.ModuleList(map(_Wide, kept))
    hook = text.embed_tokens.register_forward_hook(lambda module, args, out: out.float())
    try:
        hidden = text(ids, use_cache=False).last_hidden_state[0, -last:]
    finally:
        text.layers = kept
        hook.remove()
    return hidden.float() @ head.weight.float().T


Step = Callable[[Tensor, int], Tensor]  # token [1, 1] and its position → logits [1, vocabulary]


@torch.no_grad()
def eager(model: nn.Module, ids: Tensor) -> tuple[Tensor, Step]:
    """Stock transformers: the logits after ids [1, T], and how to go on."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def run(ids: Tensor, position: int = 0) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    return run(ids), run


@torch.no_grad()
def compiled(model: nn.Module, ids: Tensor) -> tuple[Tensor, Step]:
    """Stock transformers with a static cache, each step one CUDA graph made by torch.compile."""
    from transformers import StaticCache

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    place = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
    token = torch.zeros_like(place)

    def forward(ids: Tensor, places: Tensor) -> Tensor:
        out = model(ids, position_ids=places, past_key_values=cache, use_cache=True)
        return out.logits[:, -1]

    fast = torch.compile(forward, mode="reduce-overhead")
    logits = forward(ids, torch.arange(ids.shape[1], device=ids.device)[None])

    def run(ids: Tensor, position: int) -> Tensor:
        token.copy_(ids)
        place.fill_(position)
        torch.compiler.cudagraph_mark_step_begin()
        return fast(token, place)

    return logits, run


def ours(model: nn.Module, ids: Tensor) -> tuple[Tensor, Step]:
    decoder = Decoder(model, max_length=LENGTH)
    return decoder.prefill(ids).clone(), lambda token, position: decoder.step(token[:, 0])


#: The compiled one last: what torch.compile made keeps its model alive.
ROADS = {"eager": eager, "fuseweights": ours, "compiled": compiled}


@torch.no_grad()
def _timed(step: Step, position: int, tokens: int) -> float:
    """Seconds a token, each fed back into the next step; the best of three runs."""
    token, best = torch.ones(1, 1, dtype=torch.long, device="cuda"), float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            token = step(token, position).argmax(-1, keepdim=True)
            position += 1
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / tokens)
    return best


@torch.no_grad()
def kernels(step: Step, position: int) -> list[tuple[str, float]]:
    """Name of every kernel of one token, in order, and how many microseconds after the one before
    it (or, of the first, its own start) it ended: what it adds, although kernels overlap."""
    from torch.profiler import ProfilerActivity, profile

    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(token, position)
        torch.cuda.synchronize()
    ran = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ran = [e for e in ran if not e.name.startswith(("Memcpy", "Memset"))]
    ran.sort(key=lambda e: e.time_range.end)
    ends = [ran[0].time_range.start, *(e.time_range.end for e in ran)]
    return [(e.name, end - start) for e, start, end in zip(ran, ends, ends[1:], strict=False)]


def _summed(ran: list[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """Kernel → how often it ran and its microseconds together, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, us in ran:
        count, total = found.get(name, (0, 0.0))
        found[name] = count + 1, total + us
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


@torch.no_grad()
def measure(
    name: str, roads: tuple[str, ...] = tuple(ROADS), tokens: int = 100, **changes: Any
) -> dict[str, Any]:
    """One model, every road: tokens a second, kernels a layer, and the error of the logits after a
    prompt and, the median, of the next steps, ‖logits − float32's‖ / ‖float32's‖."""
    model = build(name, **changes)
    ids = torch.randint(0, 8000, (1, PROMPT + CHECKED), generator=torch.Generator().manual_seed(1))
    ids = ids.cuda()
    exact = truth(model, ids, CHECKED + 1)
    size, found = touched(model), {}
    for road in roads:
        found[road] = _measure_road(model, road, ids, exact, 20 if road == "eager" else tokens)
        gc.collect()
        torch.cuda.empty_cache()
    return {"model": name, "bytes": size, "floor_tokens_per_second": 4.3e12 / size, "roads": found}


def _measure_road(
    model: nn.Module, road: str, ids: Tensor, exact: Tensor, tokens: int
) -> dict[str, Any]:
    layers, end = model.config.num_hidden_layers, PROMPT + CHECKED
    start = time.perf_counter()
    logits, step = ROADS[road](model, ids[:, :PROMPT])
    seen = [logits, *(step(ids[:, at : at + 1], at).clone() for at in range(PROMPT, end))]
    errors = [error(mine[0], true) for mine, true in zip(seen, exact, strict=True)]
    ready = time.perf_counter() - start
    seconds = _timed(step, end, tokens)
    ran = kernels(step, end + 3 * tokens)
    same = torch.cat(seen).argmax(-1) == exact.argmax(-1)
    return {
        "tokens_per_second": 1 / seconds,
        "kernels_per_layer": len(ran) / layers,
        "prefill_error": errors[0],
        "step_error": median(errors[1:]),
        "same_tokens_as_float32": f"{int(same.sum())} of {len(same)}",
        "setup_s": ready,
        "kernels": _summed(ran),
        "one_layer": ran[len(ran) // 2 :][: 2 * len(ran) // layers],
    }


def check() -> list[str]:
    """The Decoder's logits and stock transformers': a few layers of the large models, and small
    ones with every kind of layer in float32 and bfloat16. Returns what is wrong."""
    problems = []
    for which, names in ((_check_large, SHAPES), (_check_small, SMALL)):
        for name in names:
            try:
                problems += which(name)
            except Exception:  # one must not hide the others
                problems.append(f"{name}: {traceback.format_exc()[-1500:]}")
    return problems


def _check_large(name: str) -> list[str]:
    """Four layers in bfloat16, against float32."""
    few = {"num_hidden_layers": 4, "vocab_size": 8192}
    roads, problems = measure(name, ("eager", "fuseweights"), 10, **few)["roads"], []
    for which in ("prefill_error", "step_error"):
        mine, theirs = (roads[road][which] for road in ("fuseweights", "eager"))
        print(f"{name}, 4 layers, {which}: ours {mine:.2e} stock {theirs:.2e}", flush=True)
        if not mine <= 1.1 * theirs:
            problems.append(f"{name} {which} {mine:.2e}, stock transformers {theirs:.2e}")
    return problems


@torch.no_grad()
def _check_small(family: str) -> list[str]:
    """Two layers, prefill and steps, against float64 on the CPU."""
    from nn_models import build as tiny

    model = tiny(family)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("eager")  # Gemma 2's SDPA leaves out its cap of the logits
    exact = model(ids).logits[:, 15:]
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        stock = copy.deepcopy(model).to("cuda", dtype)
        given = ids.cuda()
        theirs = stock(given).logits[:, 15:]
        decoder = Decoder(stock, batch=2, max_length=32)
        got = [decoder.prefill(given[:, :16])]
        got += [decoder.step(given[:, at]).clone() for at in range(16, 24)]
        mine = torch.stack(got, 1)
        wrong = [(e.cpu().double() - exact).norm(dim=-1) for e in (mine, theirs)]
        a, b = ((e / exact.norm(dim=-1)).median().item() for e in wrong)
        print(f"{family:18} {str(dtype)[6:]:9} ours {a:.2e} stock {b:.2e}", flush=True)
        if not a <= 1.5 * b:
            problems.append(f"{family} {dtype}: median error {a:.2e}, stock transformers {b:.2e}")
    return problems
