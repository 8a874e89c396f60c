"""Gated DeltaNet's prefill: the convolution and the chunked delta rule (kernels/causal_conv1d.py,
kernels/delta_chunks.py), interpreted, against float64.

The interpreter truncates what it stores as bf16, so the convolution is tested in fp16 and fp32. The
delta rule only loads bf16, which it does right.
"""

from __future__ import annotations

import pytest
import sass
import torch
from fuseweights.kernels import causal_conv1d as conv
from fuseweights.kernels import delta_chunks as delta
from fuseweights.kernels.launch import KernelError

from fuseweights.nn import ops

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = [1, 2, 15, 63, 64, 65, pytest.param(1000, marks=pytest.mark.slow)]
#: One unit in float32's last place: an error below it is the luck of one rounding.
ULP = 2.0**-23


@pytest.fixture(autouse=True)
def _random(monkeypatch):
    """The same random numbers every time, and buffers full of NaN."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*shape, **how):
        return empty(*shape, **how).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def error(out, exact):
    return float((out.double() - exact).norm() / exact.norm())


def compare(ours, plain, exact):
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert error(a, c) <= max(1.1 * error(b, c), ULP if a.dtype == FP32 else 0)


def double(inputs):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]


# The convolution


@pytest.mark.parametrize("tokens", TOKENS)
def test_convolution(tokens):
    for width, kind in ((2, FP32), (4, FP16), (5, FP16)):
        x = torch.randn(1, tokens + width - 1, 300).to(kind)
        weight = torch.randn(300, width).to(kind)
        exact = conv.reference(x.double(), weight.double())
        compare([conv.causal_conv1d(x, weight)], [conv.reference(x, weight)], [exact])
        assert torch.equal(conv.reference(x, weight), ops.causal_conv.reference(x, weight))


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_convolution_with_a_state(tokens):
    """x is some columns of a wider tensor; the state holds W − 1 inputs, or more."""
    weight = torch.randn(200, 4).to(FP16)
    x = torch.randn(2, tokens, 320).to(FP16)[..., 7:207]
    for kept in (None, 3, 6):
        state = None if kept is None else torch.randn(2, kept, 200).to(FP16).mT
        got = conv.causal_conv1d_prefill(x, weight, state)
        plain = conv.reference_prefill(x, weight, state)
        assert torch.equal(got[1], plain[1])
        if tokens:
            exact = conv.reference_prefill(*double([x, weight, state]))
            compare(got, plain, exact)


def test_convolution_of_a_prompt_in_two_pieces():
    x, weight = torch.randn(1, 90, 256), torch.randn(256, 4)
    whole, last = conv.causal_conv1d_prefill(x, weight)
    first, state = conv.causal_conv1d_prefill(x[:, :2], weight)
    second, state = conv.causal_conv1d_prefill(x[:, 2:], weight, state)
    assert torch.equal(torch.cat((first, second), 1), whole) and torch.equal(state, last)


def test_channels_may_be_the_outer_dimension():
    """transformers' cache hands [B, C, T] transposed."""
    x, weight = torch.randn(1, 300, 40).mT, torch.randn(4, 300).T
    plain = conv.reference(x, weight)
    exact = conv.reference(x.double(), weight.double())
    compare([conv.causal_conv1d(x, weight)], [plain], [exact])


@pytest.mark.parametrize(
    "x, weight, state, message",
    [
        (torch.zeros(4, 8), torch.zeros(8, 4), None, "x must be"),
        (torch.zeros(1, 4, 8), torch.zeros(7, 4), None, "weight must be"),
        (torch.zeros(1, 4, 8), torch.zeros(8, 1), None, "weight must be"),
        (torch.zeros(1, 4, 8).double(), torch.zeros(8, 4), None, "x must be bf16"),
        (torch.zeros(1, 4, 8), torch.zeros(8, 4).int(), None, "weight must be bf16"),
        (torch.zeros(1, 4, 8), torch.zeros(8, 4, device="meta"), None, "must be on"),
        (torch.zeros(1, 4, 8), torch.zeros(8, 4), torch.zeros(1, 8, 2), "state must be"),
        (torch.zeros(1, 4, 8), torch.zeros(8, 4), torch.zeros(2, 8, 3), "state must be"),
    ],
)
def test_convolution_refuses(x, weight, state, message):
    with pytest.raises(KernelError, match=message):
        conv.causal_conv1d_prefill(x, weight, state)


def test_convolution_refuses_a_missing_past():
    with pytest.raises(KernelError, match="3 tokens before the first"):
        conv.causal_conv1d(torch.zeros(1, 2, 8), torch.zeros(8, 4))


# The delta rule


def delta_inputs(tokens, key_heads, heads, kind, *, dk=32, dv=40, alike=0.0, decay=0.3, batch=1):
    """q, k, v are views of one tensor. Keys are `alike` when they share a mean, as SiLU makes them:
    the triangular system is then far from the identity."""
    wide = torch.randn(batch, tokens, 2 * key_heads * dk + heads * dv)
    wide[..., : 2 * key_heads * dk] += alike
    q, k, v = wide.to(kind).split((key_heads * dk, key_heads * dk, heads * dv), -1)
    q, k = (x.unflatten(-1, (key_heads, dk)) for x in (q, k))
    g, beta = torch.rand(2, batch, tokens, heads)
    state = torch.randn(batch, heads, dk, dv)
    return [q, k, v.unflatten(-1, (heads, dv)), -g * decay, beta, state]


def compare_delta(inputs):
    compare(delta.delta_chunks(*inputs), delta.reference(*inputs), delta.reference(*double(inputs)))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("alike", [0, 2])
def test_delta_rule(tokens, alike):
    compare_delta(delta_inputs(tokens, 4, 8, BF16, alike=alike, dk=64))


@pytest.mark.parametrize("tokens", [15, 65])
@pytest.mark.parametrize("kind", [FP16, FP32])
def test_delta_rule_in_wider_dtypes(tokens, kind):
    compare_delta(delta_inputs(tokens, 4, 8, kind, dk=128))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_head_ratios(r, tiled):
    key_heads = 2 if r < 4 else 1
    compare_delta([*delta_inputs(66, key_heads, r * key_heads, BF16), tiled])


@pytest.mark.parametrize("dk, dv", [(16, 16), (24, 8), (128, 128), (130, 64)])
def test_widths(dk, dv):
    compare_delta(delta_inputs(70, 1, 2, BF16, dk=dk, dv=dv))


def test_sequences_and_no_state():
    compare_delta([*delta_inputs(65, 1, 2, BF16, batch=2)[:5], None])


@pytest.mark.parametrize("decay", [1e-4, 30])
def test_slow_and_fast_decay(decay):
    """A cumulated decay of −2000 next to one that float32 hardly notices."""
    compare_delta(delta_inputs(130, 1, 2, BF16, decay=decay))


@pytest.mark.parametrize("with_state", [False, True])
def test_equal_keys(with_state):
    """The worst case for a system solved by powers of A, which would reach 10¹⁸: every key the
    same, β = 1, no decay. What is left is a telescoping sum of 64 changes: 64 roundings."""
    q, k, v, g, beta, state = delta_inputs(64, 1, 2, BF16)
    inputs = [q, k[:, :1].expand(k.shape), v, 0 * g, 0 * beta + 1, state if with_state else None]
    exact = delta.reference(*double(inputs))
    for got, wanted in zip(delta.delta_chunks(*inputs), exact, strict=True):
        assert error(got, wanted) <= 64 * 2**-24


def test_gates_from_the_projection():
    """a and b as strided columns, over the whole range of softplus."""
    q, k, v, *_, state = delta_inputs(100, 1, 4, BF16)
    wide = torch.randn(1, 100, 13).to(BF16) * 6
    compare_delta(
        [q, k, v, wide[..., 9:], wide[..., 5:9], state, False, torch.randn(4), torch.randn(4)]
    )


def test_segments(monkeypatch):
    """A long prompt goes through the scratch memory in pieces."""
    inputs = delta_inputs(330, 1, 2, FP16)
    whole = delta.delta_chunks(*inputs)
    monkeypatch.setattr(delta, "SEGMENT", 4 * 64)  # two heads: two chunks at a time
    for a, b in zip(delta.delta_chunks(*inputs), whole, strict=True):
        assert torch.equal(a, b)


def test_no_tokens_and_no_sequences():
    inputs = delta_inputs(3, 1, 2, FP16, batch=2)
    out, state = delta.delta_chunks(*(x[:, :0] for x in inputs[:5]), inputs[5])
    assert out.shape == (2, 0, 2, 40) and torch.equal(state, inputs[5])
    assert delta.delta_chunks(*(x[:, :0] for x in inputs[:5]), None)[1].abs().sum() == 0
    out, state = delta.delta_chunks(*(x[:0] for x in inputs))
    assert out.shape == (0, 3, 2, 40) and state.shape == (0, 2, 32, 40)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_reference_is_the_modules(tiled):
    inputs = double(delta_inputs(150, 2, 6, FP32))
    for a, b in zip(
        delta.reference(*inputs, tiled), ops.delta_chunks.reference(*inputs, tiled), strict=True
    ):
        assert error(a, b) <= 1e-14


BAD = {
    "q must be": lambda x: x.update(q=x["q"][0]),
    "v must be": lambda x: x.update(v=x["v"].flatten(2)),
    "q, k and v must be": lambda x: x.update(k=x["k"].half()),
    "last dimension must be": lambda x: x.update(v=x["v"].mT.contiguous().mT),
    "at most 128 wide": lambda x: x.update({n: x[n].repeat(1, 1, 1, 5) for n in ("q", "k")}),
    "q and k must be": lambda x: x.update(k=x["k"][..., :16]),
    "a multiple of key heads": lambda x: x.update(v=x["v"][:, :, :3]),
    "g must be": lambda x: x.update(g=x["g"][:, :2]),
    "beta must be": lambda x: x.update(beta=x["beta"].int()),
    "state must be": lambda x: x.update(state=x["state"].mT),
    "A_log must be": lambda x: x.update(A_log=torch.zeros(3)),
    "needs dt_bias": lambda x: x.update(A_log=torch.zeros(4)),
    "must be on": lambda x: x.update(state=x["state"].to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_delta_rule_refuses(message):
    names = ("q", "k", "v", "g", "beta", "state")
    inputs = dict(zip(names, delta_inputs(4, 2, 4, FP32), strict=True))
    BAD[message](inputs)
    with pytest.raises(KernelError, match=message):
        delta.delta_chunks(**inputs)


# As operators


class Core(torch.nn.Module):
    def forward(self, x, weight, past, g, beta, state):
        mixed, past = torch.ops.fuseweights.causal_conv1d_prefill(x, weight, past)
        mixed = torch.ops.fuseweights.causal_conv1d(mixed, weight)
        q, k, v = (t.unflatten(-1, (2, 16)) for t in mixed.split(32, -1))
        g, beta = g[:, 3:], beta[:, 3:]
        return *torch.ops.fuseweights.delta_chunks(q, k, v, g, beta, state), past


def core_inputs():
    return (
        torch.randn(1, 73, 96), torch.randn(96, 4), torch.randn(1, 96, 4),
        -torch.rand(1, 73, 2), torch.rand(1, 73, 2), torch.randn(1, 2, 16, 16),
    )  # fmt: skip


def test_operators(monkeypatch):
    monkeypatch.undo()  # opcheck makes tensors of its own
    x, weight, past, g, beta, state = core_inputs()
    torch.library.opcheck(conv.op, (x, weight))
    for given in (past, None):
        torch.library.opcheck(conv.op_prefill, (x, weight, given))
    q, k, v = (t.unflatten(-1, (2, 16)) for t in x.split(32, -1))
    gates = {"A_log": g[0, 0], "dt_bias": g[0, 0]}
    for given, more in ((state, {}), (None, gates)):
        torch.library.opcheck(delta.op, (q, k, v, g, beta, given, True), more)


def test_compiled_and_exported(monkeypatch):
    monkeypatch.undo()
    inputs = core_inputs()
    expected = Core()(*inputs)
    compiled = torch.compile(Core(), fullgraph=True, backend="aot_eager")(*inputs)
    exported = torch.export.export(Core(), inputs).module()(*inputs)
    for got in (compiled, exported):
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_compiled_for_hopper():
    """No spills; wide loads; matrix instructions on whole warpgroups; K, Q and the squares fetched
    by the copy engine."""
    cases = sass.reports("sass_gdn_prefill")
    for name, kernels in cases.items():
        for kernel in kernels:
            assert kernel.spills == 0, (name, kernel)
    # 12 + 3 rows of 512 channels by 128 threads; 4 + 3 rows of 256 channels by 32
    assert cases["conv 2048"][0].loads["64"] >= 15
    assert cases["conv 64"][0].loads["128"] >= 7
    within, across = cases["delta 2048"]
    assert within.loads["128"] >= 16  # q and k: 64 × 128 bf16 each, 128 threads
    assert across.opcodes["UTMALDG.2D"] >= 6 and across.shared <= 232448
    for kernel in (within, across):
        assert any(name.startswith("HGMMA.64x") for name in kernel.opcodes)
        assert not any(name.startswith("HMMA") for name in kernel.opcodes)
