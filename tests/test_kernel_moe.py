"""The experts' kernels under Triton's interpreter: against float64, and what they refuse.

fp16 stands in for bf16, which the interpreter rounds wrongly. Kernels may err by 1.1 × what plain
PyTorch in the same dtype errs by.
"""

from __future__ import annotations

import pytest
import sass
import torch
from fuseweights.kernels import moe, moe_grouped, router
from fuseweights.kernels.launch import KernelError

from fuseweights.nn.moe import SoftmaxRouter, SparseMoE

E, K, H, I = 8, 2, 64, 32  # noqa: E741


SHIPPED = moe.GATE_UP, moe.DOWN


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that a kernel allocates starts as NaN: what it leaves unwritten shows. Programs hold
    more rows than on a GPU: fewer of them, for the interpreter."""
    for name, usual in zip(("GATE_UP", "DOWN"), SHIPPED, strict=True):
        monkeypatch.setattr(moe, name, usual | {"ROWS": 16})
    torch.manual_seed(0)
    empty = torch.Tensor.new_empty

    def poisoned(self, *shape, **kwargs):
        new = empty(self, *shape, **kwargs)
        real = new.is_floating_point() and type(new) is torch.Tensor
        return new.fill_(float("nan")) if real else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


HALF = torch.float16
#: What a few float32 sums may err by, as the order of their terms falls.
FLOOR = 4 * torch.finfo(torch.float32).eps


def given(tokens, shared=I, *, experts=E, top=K, hidden=H, inter=I, dtype=HALF, act="silu"):
    """Arguments of `experts`, as wide and as deep as asked."""

    def randn(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    x = torch.randn(tokens, hidden).to(dtype)
    index, scores = torch.randint(experts, (tokens, top)), torch.rand(tokens, top).to(dtype)
    routed = randn(experts, 2 * inter, hidden), randn(experts, hidden, inter), act
    folded = (None, None, None)
    if shared:
        folded = randn(2 * shared, hidden), randn(hidden, shared), torch.rand(tokens, 1).to(dtype)
    return [x, index, scores, *routed, *folded]


def wide(arguments):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


def error(out, right):
    return float((out.double() - right).norm() / right.norm())


def allowed(plain, floor=FLOOR):
    """How far from float64 a result may be where plain PyTorch's is `plain` from it."""
    return max(1.1 * plain, floor)


def assert_right(arguments):
    right = moe.reference(*wide(arguments))
    out = moe.experts(*arguments)
    assert out.dtype == arguments[0].dtype
    assert error(out, right) <= allowed(error(moe.reference(*arguments), right))


@pytest.mark.parametrize(
    "tokens", [1, 2, 15, 63, 64, 65, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_experts(tokens):
    assert_right(given(tokens))


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu"])
def test_ragged_sizes_and_activations(tokens, act):
    """Nothing a power of two, and a shared expert of another width, or none."""
    shared = {"silu": 0, "gelu_tanh": 24, "gelu": 72}[act]
    assert_right(given(tokens, shared, experts=5, top=3, hidden=88, inter=40, act=act))


@pytest.mark.parametrize("tokens", [2, 20])
def test_longer_than_a_block(tokens, monkeypatch):
    monkeypatch.setattr(moe, "GATE_UP", {"ROWS": 4, "BLOCK": 32, "num_warps": 4})
    monkeypatch.setattr(moe, "DOWN", {"ROWS": 4, "BLOCK": 16, "num_warps": 4})
    monkeypatch.setattr(moe_grouped, "SORT_BLOCK", 16)
    monkeypatch.setattr(moe_grouped, "SUM_BLOCK", 32)
    assert_right(given(tokens, 40, hidden=80, inter=40))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("kind", ["all alike", "one expert again and again", "the last one"])
def test_skewed_routing(tokens, kind):
    arguments = given(tokens)
    rows = {"all alike": [3, 5], "one expert again and again": [4, 4], "the last one": [E - 1, 0]}
    arguments[1] = torch.tensor(rows[kind]).expand(tokens, K)
    assert_right(arguments)


@pytest.mark.parametrize("tokens", [3, 40])
def test_strided(tokens):
    arguments = given(tokens)
    usual = moe.experts(*arguments)
    x, index, scores = arguments[:3]
    arguments[0] = torch.full((tokens, 2 * H + 3), torch.nan, dtype=x.dtype)[:, 5 : 5 + H].copy_(x)
    arguments[1] = index.T.contiguous().T.to(torch.int32)
    arguments[2] = scores.float().T.contiguous().T
    assert torch.equal(moe.experts(*arguments), usual)


@pytest.mark.parametrize("few", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_either_way(dtype, few, monkeypatch):
    """As many tokens by matrix-vector products as by grouped ones; rows a program as shipped."""
    for name, usual in zip(("GATE_UP", "DOWN"), SHIPPED, strict=True):
        monkeypatch.setattr(moe, name, usual)
    monkeypatch.setattr(moe, "FEW_TOKENS", few)
    assert_right(given(2 if few else 9, dtype=dtype))


def test_a_shared_expert_is_simply_added_without_a_score():
    for tokens in (2, 20):
        arguments = given(tokens)
        assert_right(arguments[:-1])
        scored = [*arguments[:-1], torch.ones(tokens, dtype=torch.float16)]
        assert torch.equal(moe.experts(*arguments[:-1]), moe.experts(*scored))


def test_no_tokens():
    assert moe.experts(*given(0)).shape == (0, H)
    assert moe.reference(*given(0)).shape == (0, H)
    chosen = router.router(torch.zeros(0, H), torch.zeros(E, H), K, True, torch.zeros(1, H))
    assert [t.shape for t in chosen] == [(0, E), (0, K), (0, K), (0,)]


@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("skewed", [False, True])
def test_pairs_are_sorted_stably_and_cut_into_blocks(tokens, skewed, monkeypatch):
    monkeypatch.setattr(moe_grouped, "SORT_BLOCK", 32)
    index = torch.full((tokens, K), 5) if skewed else torch.randint(E - 1, (tokens, K))
    order, blocks = moe_grouped.sorted_pairs(index, E, 16)
    assert torch.equal(order.long(), index.flatten().argsort(stable=True))
    expected, start = [], 0
    for expert, count in enumerate(index.flatten().bincount().tolist()):
        end = start + count
        expected += [[expert, first, end] for first in range(start, end, 16)]
        start = end
    assert [block for block in blocks.tolist() if block[0] >= 0] == expected


# The router


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("experts", [16, 60])
def test_router(tokens, dtype, experts):
    x = torch.randn(tokens, 96).to(dtype)
    weight, gate = (torch.randn(experts, 96) / 10).to(dtype), (torch.randn(1, 96) / 10).to(dtype)
    for normalize in (True, False):
        module = SoftmaxRouter(96, experts, 4, normalize=normalize)
        module.weight.data = weight
        logits, scores, index, shared = router.router(x, weight, 4, normalize, gate)
        plain = module(x)
        assert torch.equal(index, plain[2])  # none of these have equals
        exact = router.reference(x.double(), weight.double(), 4, normalize, gate.double())
        ours = (logits, scores, shared)
        theirs = (*plain[:2], torch.sigmoid(torch.nn.functional.linear(x, gate)).flatten())
        for mine, other, right in zip(ours, theirs, (exact[0], exact[1], exact[3]), strict=True):
            # of a single value: rounding alone may err by half an eps, and have luck in the other
            floor = max(allowed(0), torch.finfo(dtype).eps / 2)
            assert error(mine, right) <= allowed(error(other.detach(), right), floor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_first_of_equal_logits_wins(dtype):
    weight = torch.zeros(12, H, dtype=dtype)
    weight[3], weight[9], weight[10] = 1, 1, 2
    for sign, expected in ((1, [10, 3, 9, 0, 1]), (-1, [0, 1, 2, 4, 5])):
        x = torch.full((1, H), sign / H, dtype=dtype)
        for index in (f(x, weight, 5, True)[2] for f in (router.router, router.reference)):
            assert index.tolist() == [expected]


def test_negative_and_extreme_logits():
    logits = [-5.0, -0.25, 3e4, -6e4, 2.0**-14, -(2.0**-14), float("-inf"), 1.0]
    weight = torch.tensor(logits, dtype=torch.float16)[:, None].expand(-1, 1).contiguous()
    x = torch.ones(1, 1, dtype=torch.float16)
    assert router.router(x, weight, 7, True)[2].tolist() == [[2, 7, 4, 5, 1, 0, 3]]


# The whole block


def block(tokens, shared=I, dtype=torch.float16):
    x, _, _, gate_up, down, act, *folded = given(tokens, shared, dtype=dtype)
    weight = (torch.randn(E, H) / 4).to(dtype)
    gate = (torch.randn(1, H) / 8).to(dtype) if shared else None
    far = clear(x, weight)
    while not far.all():
        x = torch.where(far[:, None], x, torch.randn(tokens, H).to(dtype))
        far = clear(x, weight)
    return [x, weight, K, True, gate_up, down, act, *folded[:2], gate]


def clear(x, weight):
    """Whether no rounding of a token's logits can change its experts."""
    best = (x.double() @ weight.double().T).topk(K + 1)[0]
    return best[:, -2] - best[:, -1] > 0.05


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("shared", [0, I, 48])
def test_block(tokens, shared):
    for normalize in (True, False):
        arguments = block(tokens, shared)
        arguments[3] = normalize
        right = moe.sparse_moe_reference(*wide(arguments))
        plain = error(moe.sparse_moe_reference(*arguments), right)
        assert error(moe.sparse_moe(*arguments), right) <= allowed(plain)


def test_block_is_the_module():
    arguments = block(5, dtype=torch.double)
    x, weight, _, _, gate_up, down, _, shared_gate_up, shared_down, gate = arguments
    module = SparseMoE(H, E, K, I, I, dtype=torch.double)
    module.gate.weight.data = weight
    module.experts.gate_up_proj.data, module.experts.down_proj.data = gate_up, down
    module.shared_expert.gate_up_proj.weight.data = shared_gate_up
    module.shared_expert.down_proj.weight.data = shared_down
    module.shared_expert_gate.weight.data = gate
    ours = torch.ops.fuseweights.sparse_moe(*arguments)
    torch.testing.assert_close(ours, module(x), rtol=1e-12, atol=1e-12)


# What is refused


def changed(arguments, **new):
    for at, value in new.items():
        arguments[int(at[1:])] = value(arguments[int(at[1:])]) if callable(value) else value
    return arguments


REFUSED = {
    "activation": ({"_5": "relu"}, "none of silu"),
    "x of three dimensions": ({"_0": lambda t: t[None]}, "x must be"),
    "x by columns": ({"_0": lambda t: t.T.contiguous().T}, "stride 1"),
    "x of another width": ({"_0": lambda t: t[:, :-1]}, "rows of 64, x has rows of 63"),
    "x in float64": ({"_0": lambda t: t.double()}, "x cannot be"),
    "gate_up without up": ({"_3": lambda t: t[:, :I]}, "gate_up must be"),
    "gate_up in another dtype": ({"_3": lambda t: t.float()}, "gate_up is torch.float32"),
    "gate_up elsewhere": ({"_3": lambda t: t.to("meta")}, "gate_up is on meta"),
    "gate_up strided": ({"_3": lambda t: t.mT.contiguous().mT}, "gate_up must be contiguous"),
    "down of two dimensions": ({"_4": lambda t: t[0]}, "down must be"),
    "down in another dtype": ({"_4": lambda t: t.float()}, "down is torch.float32"),
    "down strided": ({"_4": lambda t: t.mT.contiguous().mT}, "down must be contiguous"),
    "too few indices": ({"_1": lambda t: t[:-1]}, "index must be"),
    "index of floats": ({"_1": lambda t: t.float()}, "index cannot be"),
    "index elsewhere": ({"_1": lambda t: t.to("meta")}, "index is on meta"),
    "too few scores": ({"_2": lambda t: t[:, :1]}, "scores"),
    "scores of integers": ({"_2": lambda t: t.long()}, "scores cannot be"),
    "half a shared expert": ({"_7": None}, "needs both"),
    "shared_gate_up of another width": ({"_6": lambda t: t[:, :-1]}, "shared_gate_up must be"),
    "shared_down of another height": ({"_7": lambda t: t[:-1]}, "shared_down must be"),
    "too few shared scores": ({"_8": lambda t: t[:-1]}, "shared_score has 2 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, message = REFUSED[case]
    with pytest.raises(KernelError, match=message):
        moe.experts(*changed(given(3), **change))


REFUSED_ROUTER = {
    "x of one dimension": ({"_0": lambda t: t[0]}, "x must be"),
    "x in float64": ({"_0": lambda t: t.double()}, "x cannot be"),
    "another width": ({"_1": lambda t: t[:, :-1]}, "router weight must be"),
    "another dtype": ({"_1": lambda t: t.float()}, "router weight is torch.float32"),
    "elsewhere": ({"_1": lambda t: t.to("meta")}, "router weight is on meta"),
    "strided": ({"_1": lambda t: t.T.contiguous().T}, "must be contiguous"),
    "none chosen": ({"_2": 0}, "top 0 of 8 experts"),
    "more than there are": ({"_2": 9}, "top 9 of 8 experts"),
    "two shared gates": ({"_4": lambda t: t.expand(2, -1)}, "shared_gate must be"),
}


@pytest.mark.parametrize("case", REFUSED_ROUTER)
def test_router_refused(case):
    change, message = REFUSED_ROUTER[case]
    x, weight, gate = (torch.randn(n, H).half() for n in (3, E, 1))
    arguments = [x, weight, K, True, gate]
    with pytest.raises(KernelError, match=message):
        router.router(*changed(arguments, **change))


def test_block_refused():
    arguments = block(3)
    arguments[1] = arguments[1][:-1]
    with pytest.raises(KernelError, match="7 logits, 8 experts"):
        moe.sparse_moe(*arguments)


# torch.library


class Module(torch.nn.Module):
    def __init__(self, arguments):
        super().__init__()
        for name, value in zip("abcdef", (a for a in arguments if torch.is_tensor(a)), strict=True):
            self.register_buffer(name, value)

    def forward(self, x):
        shared = torch.ops.fuseweights.router(x, self.a, K, True, self.f)
        routed = torch.ops.fuseweights.experts(x, shared[2], shared[1], self.b, self.c)
        rest = self.b, self.c, "silu", self.d, self.e, self.f
        return routed + torch.ops.fuseweights.sparse_moe(x, self.a, K, True, *rest)


def test_opcheck():
    ops = torch.ops.fuseweights
    torch.library.opcheck(ops.experts.default, given(3, dtype=torch.float32))
    arguments = block(3, dtype=torch.float32)
    torch.library.opcheck(ops.sparse_moe.default, arguments)
    torch.library.opcheck(ops.router.default, (*arguments[:4], arguments[-1]))


def test_compile_and_export():
    x, *weights = block(3, dtype=torch.float32)
    module = Module(weights)
    right = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), right)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), right)


# What the compiler makes of it


@pytest.fixture(scope="module")
def reports():
    return sass.reports("sass_moe")


def test_no_spills(reports):
    assert [k for kernels in reports.values() for k in kernels if k.spills] == []


def test_decoding_takes_two_launches_or_three_with_its_router(reports):
    names = {case: [k.kernel for k in kernels] for case, kernels in reports.items()}
    assert names["experts decode"] == ["_gate_up_kernel", "_down_kernel"]
    assert names["block decode"] == ["_logits_kernel", "_gate_up_kernel", "_down_kernel"]


def test_weights_load_16_bytes_at_a_time(reports):
    """A thread's share of a program's weight rows, and of x."""
    for case in ("experts decode", "block decode"):
        *_, first, second = reports[case]
        rows = 2 * SHIPPED[0]["ROWS"] + 1
        assert first.loads["128"] >= rows * 2048 // 8 // (32 * first.warps)
        assert second.loads["128"] >= SHIPPED[1]["ROWS"] * 8 * 512 // 8 // (32 * second.warps)
    for case in ("experts M=32", "experts M=512", "experts M=2048"):
        for kernel in reports[case][1:3]:
            assert kernel.opcodes["LDGSTS.E.BYPASS.128"] >= 8
            assert not any("LDGSTS" in name and "128" not in name for name in kernel.opcodes)


def test_prefill_runs_on_the_tensor_cores(reports):
    for kernel in reports["experts M=2048"][1:3]:
        assert any(name.startswith("HGMMA.64") for name in kernel.opcodes)
