"""Gated DeltaNet's decoding kernels, in Triton's interpreter: projection, convolution, delta rule.

The interpreter truncates what it stores as bf16, so the data here are fp16 and fp32; tests/gpu_gdn
repeats the comparisons in bf16 with the compiler.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import sass
import torch
from fuseweights.kernels import causal_conv1d_update as conv
from fuseweights.kernels import gated_delta_decode as decode
from fuseweights.kernels import gdn_projection as projection
from fuseweights.kernels.launch import KernelError
from gdn_cases import RATIOS, case, copied, error, problems, token
from torch import Tensor, nn

from fuseweights.nn.delta_net import GatedDeltaNet

OPS = torch.ops.fuseweights
SMALL = projection.Heads(2, 4, 16, 32)
LAYOUTS = projection.LAYOUTS


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds NaN until a kernel writes it."""
    torch.manual_seed(0)
    usual = Tensor.new_empty

    def nans(self: Tensor, *shape: Any, **like: Any) -> Tensor:
        new = usual(self, *shape, **like)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(Tensor, "new_empty", nans)


# The decoding step


def wrong(batch: int, heads: projection.Heads, tokens: int = 1, **how: Any) -> list[str]:
    like = {name: how[name] for name in ("layout", "kind") if name in how}
    given = [token(batch, heads, **like) for _ in range(tokens)]
    return problems("decode", case(batch, heads, **how), given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_head_ratio_and_layout(ratio, layout):
    assert not wrong(1, projection.Heads(2, 2 * ratio, 16, 16), layout=layout)


def test_eight_value_heads_for_a_key_head():
    assert not wrong(1, projection.Heads(1, 8, 16, 16))


@pytest.mark.parametrize("kept", [3, 4])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_several_tokens_in_a_row(kind, kept):
    heads = projection.Heads(1, 2, 16, 32)
    assert not wrong(1, heads, 5, layout="interleaved", kind=kind, kept=kept)


@pytest.mark.parametrize("width, kept", [(2, 2), (3, 3), (3, 2), (8, 7)])
def test_other_widths_of_the_convolution(width, kept):
    assert not wrong(1, projection.Heads(1, 2, 16, 16), 3, width=width, kept=kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_convolution(layout):
    assert not wrong(1, projection.Heads(3, 6, 32, 16), 2, layout=layout, convolved=True)


@pytest.mark.parametrize(
    "batch", [3, pytest.param(64, marks=pytest.mark.slow), pytest.param(65, marks=pytest.mark.slow)]
)
def test_batches(batch):
    assert not wrong(batch, SMALL, layout="tiled")


@pytest.mark.slow
def test_the_shape_of_qwen35():
    assert not wrong(1, projection.Heads(16, 32, 128, 128), 3)


def test_an_empty_batch():
    assert decode.gated_delta_decode(**case(0, SMALL)).shape == (0, 4, 32)


def test_any_strides():
    """Gates spread out, a convolution state with its channels last, a batch that is a slice."""
    given = case(3, SMALL)
    for name in ("a", "b"):
        given[name] = given[name].repeat_interleave(3, -1)[..., ::3]
    for name in ("q", "k", "v", "z"):
        given[name] = given[name].repeat_interleave(2, 0)[::2]
    given["conv_state"] = given["conv_state"].mT.contiguous().mT
    plain = copied(given)
    out = decode.gated_delta_decode(**given)
    exact = decode.reference(**copied(plain, torch.float64))
    assert error(out, exact) <= 1.1 * error(decode.reference(**plain), exact)
    assert torch.equal(given["conv_state"], plain["conv_state"])


def test_long_memory_and_none():
    """The softplus where exp underflows, overflows, and where its logarithm would lose the 1."""
    given = case(1, projection.Heads(1, 8, 16, 16), kind=torch.float32)
    given["a"] = torch.tensor([-90.0, -40, -17, -10, 0, 10, 40, 90]).reshape(1, 1, 8)
    given["A_log"] = torch.linspace(-3, 2.7, 8)
    given["dt_bias"] = torch.zeros(8)
    ours, exact = copied(given), copied(given, torch.float64)
    decode.gated_delta_decode(**ours)
    decode.reference(**exact)
    for head in range(8):
        assert error(ours["state"][:, head], exact["state"][:, head]) < 5e-7


def test_the_last_reader_shifts_the_state():
    """A count that never fills keeps q's and k's channels, which others may still have to read."""
    given = case(1, projection.Heads(1, 4, 16, 16))
    given["arrivals"] -= 9
    before = given["conv_state"].clone()
    decode.gated_delta_decode(**given)
    assert torch.equal(given["conv_state"][:, :32], before[:, :32])
    assert torch.equal(given["conv_state"][:, 32:, :-1], before[:, 32:, 1:])
    assert (given["arrivals"] == -5).all()


WRONG = {
    "k": lambda x: x[..., :8],
    "v": lambda x: x[0],
    "z": lambda x: x.float(),
    "b": lambda x: x[:, :1],
    "a": lambda x: x[..., :1],
    "q": lambda x: x[0],
    "A_log": lambda x: x[:2],
    "dt_bias": lambda x: x.repeat(2),
    "norm_weight": lambda x: x[:16],
    "state": lambda x: x.half(),
    "conv_state": lambda x: x[..., :2],
    "conv_weight": lambda x: x[:-1],
    "arrivals": lambda x: x.long(),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("run", [decode.gated_delta_decode, OPS.gated_delta_decode])
def test_refuses(name, run):
    given = case(1, SMALL)
    with pytest.raises(KernelError, match=name):
        run(**given | {name: WRONG[name](given[name])})


def test_refuses_strides_devices_and_what_is_missing():
    given = case(2, SMALL)
    with pytest.raises(KernelError, match="a: expected on cpu, found meta"):
        decode.gated_delta_decode(**given | {"a": given["a"].to("meta")})
    spread = {"state": given["state"].mT.contiguous().mT}
    for name in ("q", "k", "v", "z"):
        spread[name] = given[name].repeat_interleave(2, -1)[..., ::2]
    for name, x in spread.items():
        with pytest.raises(KernelError, match=f"{name}: expected .*strides"):
            decode.gated_delta_decode(**given | {name: x})
    for name in ("conv_weight", "arrivals"):
        with pytest.raises(KernelError, match=f"{name}: expected"):
            decode.gated_delta_decode(**given | {name: None})
    with pytest.raises(KernelError, match="conv_weight: expected at least 2 taps"):
        one = given["conv_weight"][:, :1].contiguous()
        decode.gated_delta_decode(**given | {"conv_weight": one})
    heads = projection.Heads(1, 1, 24, 16)
    with pytest.raises(KernelError, match="dk: expected a power of two, found 24"):
        decode.gated_delta_decode(**case(1, heads))


# The projections


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_views_are_the_modules_parts(ratio, layout):
    """As GatedDeltaNet.project takes them apart; no byte is moved."""
    heads = projection.Heads(2, 2 * ratio, 8, 16)
    module = GatedDeltaNet(12, *heads, layout=layout, one=False)
    x = torch.randn(2, 3, 12)
    qkvz, ba = module.in_proj_qkvz(x), module.in_proj_ba(x)
    qkv, z, b, a = projection.split(qkvz, ba, heads, layout)
    for ours, theirs in zip((qkv, z, b, a), module.project(x), strict=True):
        assert torch.equal(ours, theirs)

    parts = projection.views(qkvz, ba, heads, layout)
    for name, part in parts._asdict().items():
        owner = ba if name in "ab" else qkvz
        assert part.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()

    def in_order(x: Tensor) -> Tensor:  # of value heads
        return (x.transpose(2, 3) if layout == "tiled" else x).flatten(2, 3)

    mixed = torch.cat((parts.q.flatten(2), parts.k.flatten(2), in_order(parts.v).flatten(2)), -1)
    assert torch.equal(mixed, qkv)
    for name, whole in (("z", z), ("b", b), ("a", a)):
        assert torch.equal(in_order(getattr(parts, name)), whole)


@pytest.mark.parametrize(
    "tokens, ratio",
    [
        *((1, ratio) for ratio in RATIOS),
        *((0, 2), (2, 3), (15, 8), (63, 1), (64, 2), (65, 3)),
        pytest.param(1000, 2, marks=pytest.mark.slow),
    ],
)
def test_split(tokens, ratio):
    """Of slices of one output, and of gates that are not adjacent."""
    heads = projection.Heads(2, 2 * ratio, 32, 16)
    x = torch.randn(tokens, 2 * heads.group + 8 * ratio + 5)
    qkvz, ba = x[:, 5:].split((2 * heads.group, 8 * ratio), -1)
    kinds = ba[:, : 4 * ratio], ba[:, ::2], ba.mT.contiguous().mT[:, -4 * ratio :]
    for gates in kinds if tokens < 3 else kinds[tokens % 3 :][:1]:
        ours = projection.gdn_split(qkvz, gates, *heads)
        for mine, theirs in zip(ours, projection.reference(qkvz, gates, heads), strict=True):
            assert mine.is_contiguous() and torch.equal(mine, theirs)


def test_split_refuses():
    qkvz, ba = torch.zeros(2, 2 * SMALL.group), torch.zeros(2, 8)
    for changed, says in (
        ({"qkvz": qkvz[:, 1:]}, "qkvz: expected 320 columns"),
        ({"ba": ba[:, 1:]}, "ba: expected 8 columns"),
        ({"ba": ba[:1]}, "ba: expected"),
        ({"ba": ba.half()}, "ba: expected torch.float32"),
        ({"ba": ba.to("meta")}, "ba: expected on cpu"),
        ({"heads": SMALL._replace(values=3)}, "value heads: expected a multiple"),
        ({"layout": "sideways"}, "layout: expected one of"),
    ):
        given = {"qkvz": qkvz, "ba": ba, "heads": SMALL, "layout": "interleaved"} | changed
        for function in (projection.views, projection.split):
            with pytest.raises(KernelError, match=says):
                function(**given)
    for run in (projection.gdn_split, OPS.gdn_split):
        with pytest.raises(KernelError, match="adjacent"):
            run(qkvz.mT.contiguous().mT, ba, *SMALL)
        with pytest.raises(KernelError, match=r"expected \[T, columns"):
            run(qkvz[None], ba, *SMALL)
        odd = projection.Heads(2, 4, 24, 32)
        with pytest.raises(KernelError, match="dk: expected a power of two"):
            run(torch.zeros(2, 2 * odd.group), ba, *odd)


# The convolution


@pytest.mark.parametrize("tokens, channels", [(1, 256), (2, 48), (5, 6), (15, 64), (16, 32)])
@pytest.mark.parametrize("kept", [3, 4])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_convolution(tokens, channels, kept, kind):
    """Of a transposed input, and a state whose channels are last."""
    x = torch.randn(2, channels, tokens).to(kind).mT
    state = torch.randn(2, kept, channels).to(kind).mT
    weight = torch.randn(channels, 4).to(kind)
    mine, theirs = state.clone(), state.clone()
    exact = conv.reference(x.double(), state.double(), weight.double())
    out, plain = conv.causal_conv1d_update(x, mine, weight), conv.reference(x, theirs, weight)
    assert error(out, exact) <= max(1.1 * error(plain, exact), 3e-7 * (kind is torch.float32))
    assert torch.equal(mine, theirs)


def test_convolution_of_no_sequence():
    x, state = torch.zeros(0, 1, 32), torch.zeros(0, 32, 3)
    assert conv.causal_conv1d_update(x, state, torch.zeros(32, 4)).shape == (0, 1, 32)


def test_the_convolutions_formula():
    """One channel, by hand: the reference is the convolution PyTorch computes."""
    x, state, weight = torch.randn(1, 3, 2), torch.randn(1, 2, 4), torch.randn(2, 4)
    inputs = torch.cat((state[..., 1:], x.mT), 2)
    expected = nn.functional.silu(nn.functional.conv1d(inputs, weight[:, None], groups=2)).mT
    torch.testing.assert_close(conv.reference(x, state, weight), expected)
    assert torch.equal(state, inputs[..., -4:])


@pytest.mark.parametrize(
    "name, x",
    [
        ("x", torch.zeros(2, 32)),
        ("x", torch.zeros(2, 17, 32)),
        ("x", torch.zeros(2, 0, 32)),
        ("weight", torch.zeros(31, 4)),
        ("weight", torch.zeros(4, 32).mT),
        ("weight", torch.zeros(32, 1)),
        ("conv_state", torch.zeros(2, 32, 5)),
        ("conv_state", torch.zeros(2, 32, 4).half()),
    ],
)
@pytest.mark.parametrize("run", [conv.causal_conv1d_update, OPS.causal_conv1d_update])
def test_convolution_refuses(run, name, x):
    given = {"x": torch.zeros(2, 1, 32), "conv_state": torch.zeros(2, 32, 4)}
    with pytest.raises(KernelError, match=f"{name}: expected"):
        run(**given | {"weight": torch.zeros(32, 4), name: x})


@pytest.mark.parametrize("name", ["conv_state", "weight"])
def test_convolution_refuses_another_device(name):
    given = {"x": torch.zeros(2, 1, 32), "conv_state": torch.zeros(2, 32, 4)}
    given["weight"] = torch.zeros(32, 4)
    with pytest.raises(KernelError, match=f"{name}: expected on cpu, found meta"):
        conv.causal_conv1d_update(**given | {name: given[name].to("meta")})


# As operations of PyTorch


class Step(nn.Module):
    """A module that splits, convolves and decodes through the operations."""

    def __init__(self, **given: Any):
        super().__init__()
        self.tiled = given.pop("tiled")
        self.names = [name for name in given if name not in ("q", "k", "v", "z", "b", "a")]
        for name in self.names:
            self.register_buffer(name, given[name])

    def forward(self, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, ...]:
        parts = projection.views(qkvz, ba, SMALL, "interleaved")
        given = {name: getattr(self, name) for name in self.names}
        out = OPS.gated_delta_decode(**parts._asdict(), **given, tiled=self.tiled)
        qkv, *_ = projection.split(qkvz, ba, SMALL, "interleaved")
        return out, OPS.causal_conv1d_update(qkv[:, None], self.conv_state, self.conv_weight)


def module_and_inputs() -> tuple[Step, tuple[Tensor, Tensor]]:
    x = torch.randn(2, 2 * SMALL.group), torch.randn(2, 2 * SMALL.values)
    return Step(**case(2, SMALL, kind=torch.float32)), x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    module, x = module_and_inputs()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)
    for _ in range(2):
        for ours, theirs in zip(compiled(*x), module(*x), strict=True):
            assert torch.equal(ours, theirs)
    for name, state in compiled.named_buffers():
        assert torch.equal(state, module.get_buffer(name.removeprefix("_orig_mod."))), name


def test_exports():
    module, x = module_and_inputs()
    exported = torch.export.export(copy.deepcopy(module), x).module()
    for ours, theirs in zip(exported(*x), module(*x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(exported.state, module.state)


def test_opcheck():
    given = case(2, SMALL, kind=torch.float32)
    torch.library.opcheck(OPS.gated_delta_decode.default, (), given)
    torch.library.opcheck(OPS.gated_delta_decode.default, (), case(2, SMALL, convolved=True))
    x = torch.randn(3, 2 * SMALL.group), torch.randn(3, 2 * SMALL.values)
    torch.library.opcheck(OPS.gdn_split.default, (*x, *SMALL))
    x = torch.randn(2, 3, 32), torch.randn(2, 32, 4), torch.randn(32, 4)
    torch.library.opcheck(OPS.causal_conv1d_update.default, x)


# What the compiler makes of them


@pytest.fixture(scope="module")
def compiled() -> dict[str, sass.Report]:
    return {name: report for name, (report,) in sass.reports("sass_gdn").items()}


def test_nothing_spills(compiled):
    assert {name: report.spills for name, report in compiled.items() if report.spills} == {}


def test_wide_loads_and_stores(compiled):
    """A thread's part of the state, all of it in registers, in pieces of 16 bytes; an interleaved
    layout costs nothing more."""
    for name, report in compiled.items():
        if name.startswith("decode"):
            pieces = 128 * 128 * 4 // (32 * report.warps * 16)
            stores = sum(n for op, n in report.opcodes.items() if re.match(r"STG.*\.128", op))
            assert report.loads["128"] >= pieces == stores, name
    usual, interleaved = (compiled[f"decode 1{how}"] for how in ("", ", interleaved"))
    assert abs(usual.instructions - interleaved.instructions) < 50
    assert compiled["split 2048"].loads["128"] == 6  # q, k, two of v, two of z


def test_few_barriers(compiled):
    """A tile that changes its layout costs two: where the compiler dealt out S by rows, 42. And no
    fence, which would wait until all of S is here."""
    for name, report in compiled.items():
        if name.startswith("decode"):
            assert report.opcodes["BAR.SYNC.DEFER_BLOCKING"] <= 16, name
            assert not any(op.startswith("MEMBAR") for op in report.opcodes), name
