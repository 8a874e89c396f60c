"""Gated DeltaNet's decoding on a GPU: that it is right (`check`), and how fast (`rows`)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fuseweights.kernels import causal_conv1d_update as conv
from fuseweights.kernels import gated_delta_decode as decode
from fuseweights.kernels import gdn_projection as projection
from gdn_cases import RATIOS, case, copied, error, problems, token
from gpu import microseconds, rotated
from torch import Tensor

QWEN35 = projection.Heads(16, 32, 128, 128)
OPS = torch.ops.fuseweights
BF16 = torch.bfloat16


def _problems(
    name: str,
    batch: int,
    heads: projection.Heads,
    layout: str = "contiguous",
    kind: torch.dtype = BF16,
    **how: Any,
) -> list[str]:
    torch.manual_seed(0)
    given = case(batch, heads, layout, kind, "cuda", **how)
    return problems(name, given, [token(batch, heads, layout, kind, "cuda") for _ in range(4)])


def check() -> list[str]:
    found = []
    for ratio, layout in itertools.product(RATIOS, projection.LAYOUTS):
        heads = projection.Heads(2, 2 * ratio, 128, 128)
        found += _problems(f"r={ratio} {layout}", 3, heads, layout)
    for kind, kept in itertools.product((torch.float16, torch.float32), (3, 4)):
        heads = projection.Heads(4, 8, 64, 128)
        name = f"{kind}, convolution state of {kept}"
        found += _problems(name, 2, heads, "interleaved", kind, kept=kept)
    for batch, convolved in itertools.product((1, 16, 64, 65), (False, True)):
        found += _problems(f"B={batch}, {convolved=}", batch, QWEN35, convolved=convolved)
    found += _problems("narrow heads", 5, projection.Heads(2, 8, 16, 32))
    if decode.gated_delta_decode(**case(0, QWEN35, device="cuda")).shape != (0, 32, 128):
        found.append("B=0")
    return found + _check_conv() + _check_split() + _check_graph()


def _check_conv() -> list[str]:
    found = []
    for tokens, kept, channels in itertools.product((1, 2, 5), (3, 4), (64, 8192, 8208)):
        x = torch.randn(3, channels, tokens, device="cuda").bfloat16().mT
        state = torch.randn(3, channels, kept, device="cuda").bfloat16()
        weight = torch.randn(channels, 4, device="cuda").bfloat16()
        mine, theirs = state.clone(), state.clone()
        exact = conv.reference(x.double(), state.double(), weight.double())
        out, plain = OPS.causal_conv1d_update(x, mine, weight), conv.reference(x, theirs, weight)
        if not (error(out, exact) <= 1.1 * error(plain, exact) and torch.equal(mine, theirs)):
            found.append(f"convolution: {tokens} tokens, {channels} channels, state of {kept}")
    return found


def _check_split() -> list[str]:
    found = []
    for tokens, ratio in itertools.product((1, 15, 64, 65, 1000), RATIOS):
        heads = projection.Heads(2, 2 * ratio, 128, 128)
        x = torch.randn(tokens, 2 * heads.group + 4 * ratio + 7, device="cuda").bfloat16()
        given = x[:, : 2 * heads.group], x[:, 2 * heads.group : -7]
        parts = projection.gdn_split(*given, *heads), projection.reference(*given, heads)
        if not all(torch.equal(*pair) for pair in zip(*parts, strict=True)):
            found.append(f"split: {tokens} tokens, r={ratio}")
    return found


def _check_graph() -> list[str]:
    """Captured and replayed, and compiled: the same bits as called."""
    given = case(2, QWEN35, kind=BF16, device="cuda")
    called, captured, compiled = (copied(given) for _ in range(3))
    stream = torch.cuda.Stream()
    decode.gated_delta_decode(**copied(given))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = decode.gated_delta_decode(**captured)
    function = torch.compile(lambda kw: OPS.gated_delta_decode(**kw), fullgraph=True)
    found = []
    for step in range(3):
        truth = decode.gated_delta_decode(**called)
        graph.replay()
        if not torch.equal(out, truth):
            found.append(f"graph replay {step}")
        if not torch.equal(function(compiled), truth):
            found.append(f"torch.compile, call {step}")
    for name in ("state", "conv_state"):
        for other in (captured, compiled):
            if not torch.equal(called[name], other[name]):
                found.append(f"{name} after a graph or torch.compile")
    return found


def fla() -> tuple[str, Callable[..., Tensor], Callable[..., Tensor]] | None:
    """flash-linear-attention: version, its three kernels for this step, the recurrence alone."""
    try:
        from importlib.metadata import version

        from fla.modules.causal_conv1d.ops import causal_conv1d_update
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    except Exception as problem:
        print("fla does not import:", problem)
        return None

    def recurrence(q: Tensor, k: Tensor, v: Tensor, kw: dict[str, Any]) -> Tensor:
        return fused_recurrent_gated_delta_rule(
            q, k, v, g=kw["a"], beta=kw["b"], initial_state=kw["state"], output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=kw["A_log"],
            dt_bias=kw["dt_bias"], use_beta_sigmoid_in_kernel=True,
        )[0]  # fmt: skip

    def chain(kw: dict[str, Any]) -> Tensor:
        x, batch = kw["x"], kw["x"].shape[0]
        y, _ = causal_conv1d_update(
            x, kw["conv_state"], weight=kw["conv_weight"], activation="silu"
        )
        qkv = (t.reshape(batch, 1, -1, 128) for t in y.split((2048, 2048, 4096), -1))
        o = recurrence(*qkv, kw)
        return rms_norm_gated(o, kw["z"], kw["norm_weight"], None, "swish", eps=1e-6)

    return f"fla-core {version('fla-core')}", chain, lambda kw: recurrence(*kw["qkv"], kw)


def for_fla(given: dict[str, Any]) -> dict[str, Any]:
    q, k, v, z, b, a = (given[name].flatten(1).contiguous() for name in "qkvzba")
    heads = [x.unflatten(1, (1, -1, 128)) for x in (q, k, v, z)]
    gates = {"b": b[:, None], "a": a[:, None], "z": heads.pop()}
    return given | gates | {"x": torch.cat((q, k, v), 1), "qkv": heads}


def cold(batch: int) -> list[dict[str, Any]]:
    """Arguments that share the projections' output, hot as its product leaves it, but whose states
    and weights L2 has forgotten."""
    given = case(batch, QWEN35, kind=BF16, device="cuda")
    given |= token(batch, QWEN35, kind=BF16, device="cuda", foreign=0)
    own = ("state", "conv_state", "arrivals", "conv_weight", "A_log", "dt_bias", "norm_weight")

    def make() -> dict[str, Any]:
        return given | {name: given[name].clone() for name in own}

    return rotated(make, bytes_moved(batch) // 2)


def bytes_moved(batch: int) -> int:
    """The state and the convolution's read and written, its weights, the token and the output."""
    a_sequence = 2 * 32 * 128 * 128 * 4 + 2 * 8192 * 4 * 2 + (12288 + 64 + 4096) * 2
    return batch * a_sequence + 8192 * 4 * 2


def _row(kernel: str, shape: str, moved: int, ours: float) -> dict[str, Any]:
    return {"kernel": kernel, "shape": shape, "bytes": moved, "floor_us": moved / 4.3e6,
            "ours_us": ours}  # fmt: skip


def _compiled_us(function: Callable[..., Tensor], sets: list[dict[str, Any]]) -> float:
    function = torch.compile(function, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return microseconds(lambda kw: function(**kw), sets, rounds=3)


def rows() -> list[dict[str, Any]]:
    table, peer = [], fla()
    for batch in (1, 4, 16, 64):
        sets = cold(batch)
        moved = bytes_moved(batch)
        ours = microseconds(lambda kw: decode.gated_delta_decode(**kw), sets)
        row = _row("gated_delta_decode", f"B={batch}, 16/32 heads of 128", moved, ours)
        state = batch * 2 * 32 * 128 * 128 * 4
        row["note"] = f"state {state / ours / 1e6:.2f} TB/s"
        if batch in (1, 64):
            row["pytorch_us"] = microseconds(lambda kw: decode.reference(**kw), sets, rounds=3)
        if batch == 1:
            row["compiled_us"] = _compiled_us(decode.reference, sets)
        if peer:
            name, chain, alone = peer
            theirs = [for_fla(kw) for kw in sets[: len(sets) // 2 + 1]]
            row["peer"], row["peer_us"] = f"{name}, three kernels", microseconds(chain, theirs)
            row["note"] += f"; its recurrence alone {microseconds(alone, theirs):.1f} µs"
            del theirs
        table.append(row)
        del sets
        torch.cuda.empty_cache()
    return table + _conv_rows(peer) + _split_rows()


def _conv_rows(peer: Any) -> list[dict[str, Any]]:
    def make() -> dict[str, Tensor]:
        return {"x": torch.randn(1, 1, 8192, device="cuda").bfloat16(),
                "conv_state": torch.randn(1, 8192, 4, device="cuda").bfloat16(),
                "weight": torch.randn(8192, 4, device="cuda").bfloat16()}  # fmt: skip

    sets = rotated(make, 4 << 20)
    moved = 8192 * 2 * (4 + 4 + 4 + 2)
    ours = microseconds(lambda kw: conv.causal_conv1d_update(**kw), sets)
    row = _row("causal_conv1d_update", "B=1, 8192 channels", moved, ours)
    row["pytorch_us"] = microseconds(lambda kw: conv.reference(**kw), sets, rounds=3)
    if peer:
        from fla.modules.causal_conv1d.ops import causal_conv1d_update as theirs

        row["peer"], row["peer_us"] = peer[0], microseconds(
            lambda kw: theirs(kw["x"], kw["conv_state"], weight=kw["weight"], activation="silu"),
            sets,
        )  # fmt: skip
    return [row]


def _split_rows() -> list[dict[str, Any]]:
    table = []
    for tokens in (1, 2048):

        def make(tokens: int = tokens) -> tuple[Tensor, ...]:
            return tuple(torch.randn(tokens, n, device="cuda").bfloat16() for n in (12288, 64))

        moved = 2 * tokens * 12352 * 2
        sets = rotated(make, moved, 128)
        ours = microseconds(lambda x: projection.gdn_split(*x, *QWEN35), sets)
        row = _row("gdn_split", f"T={tokens}, interleaved", moved, ours)
        row["pytorch_us"] = microseconds(lambda x: projection.reference(*x, QWEN35), sets, rounds=3)
        function = torch.compile(lambda x: projection.reference(*x, QWEN35), fullgraph=True)
        row["compiled_us"] = microseconds(function, sets, rounds=3)
        table.append(row)
        del sets
        torch.cuda.empty_cache()
    return table
