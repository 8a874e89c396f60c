"""Each module by itself: against transformers' own layers, in every layout, compiled, exported."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from nn_models import build, distance  # noqa: E402
from torch import nn  # noqa: E402

from fuseweights.errors import UsageError  # noqa: E402
from fuseweights.nn import (  # noqa: E402
    AddRMSNorm,
    Experts,
    FusedAttention,
    FusedLinear,
    GatedDeltaNet,
    GatedMLP,
    RMSNorm,
    SparseMoE,
    ops,
)


def test_importing_fuseweights_does_not_import_torch():
    code = "import sys, fuseweights; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def layer(family: str, name: str, dtype=torch.float64, at: int = 0, **changes) -> nn.Module:
    return build(family, dtype, **changes).get_submodule(f"model.layers.{at}.{name}")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


# MLP and norms


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "act, ours",
    [
        ("silu", "silu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu", "gelu"),
    ],
)
def test_mlp(act, ours, bias):
    mlp = layer("llama", "mlp", hidden_act=act, mlp_bias=bias)
    fused = GatedMLP.from_parts(mlp)
    assert fused.act == ours
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    assert distance(fused(x), mlp(x)) <= 1e-12
    assert next(iter(fused.state_dict())) == "gate_up_proj.weight"
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = (copy.deepcopy(m).to(dtype)(x.to(dtype)) for m in (fused, mlp))
        assert distance(mine, fused(x)) <= 1.1 * distance(theirs, fused(x))
        if dtype == torch.float32:
            assert distance(mine, theirs) <= 1e-6


def test_an_unknown_activation_is_refused():
    with pytest.raises(UsageError, match="none of silu, gelu_tanh, gelu"):
        GatedMLP.from_parts(layer("llama", "mlp", hidden_act="relu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, norm", [("llama", "llama"), ("gemma2", "gemma"), ("gemma4_text", "late")]
)
def test_add_and_norm(family, norm, dtype):
    """What a decoder layer does in two steps, to the bit in float32 and bfloat16."""
    theirs = layer(family, "input_layernorm", dtype)
    ours = AddRMSNorm.from_parts(theirs)
    assert ours.norm == norm
    x, residual = torch.randn(2, 5, 3, 64).to(dtype)
    normed, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    if dtype == torch.float64:
        assert distance(normed, theirs(x + residual)) <= 1e-6
    else:
        assert torch.equal(normed, theirs(x + residual))
    assert torch.equal(ours(total)[0], normed)


def test_a_norm_that_is_none_is_refused():
    with pytest.raises(UsageError, match="LayerNorm"):
        RMSNorm.from_parts(nn.LayerNorm(16))


# Attention


@pytest.mark.parametrize("window", [None, 3])
def test_attention_without_a_model_is_causal(window):
    """Made from sizes alone, a call without a mask sees the past only, within the window."""
    fused = FusedAttention(64, 4, 2, 16, rope=None, sliding_window=window).double()
    x = torch.randn(1, 7, 64, dtype=torch.float64)
    q, k, v = (
        t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in fused.qkv_proj(x).split((64, 32, 32), -1)
    )
    at = torch.arange(7)
    mask = (at <= at[:, None]) & (at > at[:, None] - (window or 99))
    want = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert distance(fused(x)[0], fused.o_proj(want.transpose(1, 2).flatten(-2))) <= 1e-12


# Gated DeltaNet


def mixer(r: int = 2, keys: int = 2, family: str = "qwen3_5_text", **changes) -> nn.Module:
    sizes = {"linear_num_key_heads": keys, "linear_num_value_heads": r * keys}
    return layer(family, "linear_attn", **sizes, linear_value_head_dim=8, **changes)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "family, one", [("qwen3_5_text", 1), ("qwen3_5_text", 0), ("qwen3_next", 1)]
)
def test_delta_net_layouts(family, one, r):
    """Four in one, two and two, interleaved per key head; r value heads a key head; a strided
    input; lengths around a chunk. Theirs runs the rule in float32 even here, which by itself is up
    to 3e-6 from float64 for these weights."""
    theirs = mixer(r, family=family)
    ours = GatedDeltaNet.from_parts(theirs, one=bool(one))
    names = {name.split(".")[0] for name in ours.state_dict()}
    one_product = family == "qwen3_5_text" and one
    assert names >= ({"in_proj"} if one_product else {"in_proj_qkvz", "in_proj_ba"})
    for tokens in (1, 5, 64, 65, 130):
        x = torch.randn(2, tokens, 128, dtype=torch.float64)[..., ::2]
        assert not x.is_contiguous()
        with torch.no_grad():
            assert distance(ours(x), theirs(x)) <= 5e-6


def tile(rows: torch.Tensor, keys: int, r: int, dim: int = 0) -> torch.Tensor:
    """Value heads from grouped (h = k·r + j) to GGUF's tiled order (h = j·nK + k)."""
    width = rows.shape[dim] // (keys * r)
    return rows.unflatten(dim, (keys, r, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_delta_net_with_tiled_value_heads(r):
    """GGUF's qwen35 order in v, z, b, a, A, dt, conv and out_proj's columns: the same function."""
    theirs = mixer(r, keys=3)
    ours = copy.deepcopy(GatedDeltaNet.from_parts(theirs))
    keys = 3 * 16
    with torch.no_grad():
        for name, tensors in ours.in_proj.parts().items():
            rows = tensors["weight"][2 * keys :] if name == "in_proj_qkv" else tensors["weight"]
            rows.copy_(tile(rows, 3, r))
        conv = ours.conv1d.weight[2 * keys :]
        conv.copy_(tile(conv, 3, r))
        for name in ("A_log", "dt_bias"):
            getattr(ours, name).copy_(tile(getattr(ours, name), 3, r))
        ours.out_proj.weight.copy_(tile(ours.out_proj.weight, 3, r, dim=1))
        ours.layout = "tiled"
        x = torch.randn(2, 9, 64, dtype=torch.float64)
        assert distance(ours(x), theirs(x)) <= 1e-6
        if r > 1:
            ours.layout = "contiguous"
            assert distance(ours(x), theirs(x)) > 1e-2


def delta_inputs(tokens: int, r: int, dtype=torch.float64):
    torch.manual_seed(tokens + r)
    q, k = torch.randn(2, 2, tokens, 2, 16, dtype=dtype)
    v = torch.randn(2, tokens, 2 * r, 8, dtype=dtype)
    g = -torch.rand(2, tokens, 2 * r, dtype=dtype) * 3
    return q, k, v, g, torch.rand_like(g), torch.randn(2, 2 * r, 16, 8, dtype=dtype)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 150])
def test_chunks_equal_single_steps(tokens, tiled):
    *inputs, state = delta_inputs(tokens, 3)
    out, last = ops.delta_chunks(*inputs, state, tiled)
    for t in range(tokens):
        step, state = ops.delta_step(*(x[:, t : t + 1] for x in inputs), state, tiled)
        assert distance(out[:, t : t + 1], step) <= 1e-12
    assert distance(last, state) <= 1e-12


def test_strided_inputs_of_the_delta_rule():
    *inputs, state = delta_inputs(70, 2)
    views = [torch.stack((x, x + 1), -1)[..., 0] for x in inputs]
    assert not any(view.is_contiguous() for view in views)
    for a, b in zip(ops.delta_chunks(*views, state), ops.delta_chunks(*inputs, state), strict=True):
        assert distance(a, b) <= 1e-14
    views, inputs = ([x[:, :1] for x in them] for them in (views, inputs))
    assert torch.equal(ops.delta_step(*views, state)[0], ops.delta_step(*inputs, state)[0])


def test_strong_decay_and_equal_keys_stay_finite():
    q, k, v, g, beta, state = delta_inputs(130, 2, torch.float32)
    k = k[:, :1].expand_as(k)
    for rate in (0.0, -80.0):
        g, beta = torch.full_like(g, rate), torch.ones_like(beta)
        out, last = ops.delta_chunks(q, k, v, g, beta, state)
        ref, _ = ops.delta_chunks(*(t.double() for t in (q, k, v, g, beta, state)))
        assert out.isfinite().all() and last.isfinite().all()
        assert distance(out, ref) <= 1e-5


def test_convolution_sums_in_float32():
    """bfloat16 in and out, one rounding: as near to float64 as bfloat16 can be."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 64).bfloat16(), torch.randn(64, 4).bfloat16()
    out, exact = ops.causal_conv(x, weight), ops.causal_conv(x.double(), weight.double())
    assert out.dtype == torch.bfloat16 and out.shape == (2, 9, 64)
    assert distance(out, exact.bfloat16()) <= 1e-4
    conv = nn.functional.conv1d(
        x.double().transpose(1, 2), weight.double()[:, None], groups=64
    ).transpose(1, 2)
    assert distance(exact, nn.functional.silu(conv)) <= 1e-14


# Experts


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_experts_gathered_and_grouped(tokens):
    """Few tokens gather weights, many are sorted by expert: the same sums as transformers' loop."""
    moe = layer("qwen3_5_moe_text", "mlp", num_experts=6)
    ours = SparseMoE.from_parts(moe)
    x = torch.randn(1, tokens, 64, dtype=torch.float64)
    assert distance(ours(x), moe(x)) <= 1e-12
    assert ours.experts.gate_up_proj is moe.experts.gate_up_proj
    names = set(ours.state_dict())
    assert names == {
        *("gate.weight", "experts.gate_up_proj", "experts.down_proj"),
        *("shared_expert.gate_up_proj.weight", "shared_expert.down_proj.weight"),
        "shared_expert_gate.weight",
    }


def test_experts_from_a_list():
    mlps = nn.ModuleList(build("llama").model.layers[0].mlp for _ in range(4))
    for i, mlp in enumerate(mlps):
        nn.init.normal_(mlp.gate_proj.weight, std=0.1 + i)
    ours = Experts.from_parts(mlps)
    x, index = torch.randn(9, 64, dtype=torch.float64), torch.randint(0, 4, (9, 1))
    want = torch.stack([mlps[int(e)](t) for t, e in zip(x, index, strict=True)])
    assert distance(ours(x, index, torch.ones(9, 1, dtype=torch.float64)), want) <= 1e-12


def test_grouped_product_has_gradients():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 7])
    assert torch.autograd.gradcheck(lambda x, w: ops.grouped_linear(x, w, ends), (x, weight))


def test_what_does_not_fit_is_refused_with_a_reason():
    with pytest.raises(UsageError, match="GptOssExperts is not laid out"):
        Experts.from_parts(layer("gpt_oss", "mlp.experts"))
    with pytest.raises(UsageError, match="e_score_correction_bias"):
        SparseMoE.from_parts(layer("minimax_m2", "mlp"))
    with pytest.raises(UsageError, match="reads another's keys"):
        FusedAttention.from_parts(layer("gemma4_text", "self_attn", at=3))
    with pytest.raises(UsageError, match="llama4_text is not known"):
        FusedAttention.from_parts(layer("llama4_text", "self_attn"))
    extra = layer("llama", "self_attn")
    extra.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(UsageError, match="FusedAttention knows nothing of: temperature"):
        FusedAttention.from_parts(extra)


def test_multi_head_latent_attention_shares_one_product():
    """DeepSeek's q_a and kv_a: a FusedLinear under vLLM's name gives both."""
    attention = layer("deepseek_v3", "self_attn")
    parts = {name: getattr(attention, name) for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    fused = FusedLinear.from_parts(parts)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    for ours, part in zip(fused.split(fused(x)), parts.values(), strict=True):
        assert distance(ours, part(x)) <= 1e-12


def test_a_kernel_slips_in_underneath():
    mlp, calls = GatedMLP(16, 24), []

    def run(gate_up, act):
        calls.append(act)
        return ops.gated.reference(gate_up, act)

    x = torch.randn(3, 16)
    plain = mlp(x)
    ops.gated.kernels.append((lambda gate_up, act: act == "silu", run))
    try:
        assert torch.equal(mlp(x), plain) and calls == ["silu"]
        mlp.act = "gelu"
        mlp(x)
        assert calls == ["silu"]
    finally:
        ops.gated.kernels.clear()


# From sizes alone, compiled and exported


def modules():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 64)
    angles = torch.randn(2, 6, 8)
    rope = torch.cat((angles, angles), -1)
    places = (rope.cos(), rope.sin())
    kv = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    partial = tuple(p[..., :8] for p in places)
    return {
        "linear": (FusedLinear(64, {"q_proj": 64, "k_proj": 32}, bias=True), (x,)),
        "mlp": (GatedMLP(64, 96, "gelu_tanh", bias=True), (x,)),
        "attention": (FusedAttention(64, **kv, qk_norm="llama"), (x, places)),
        "gated_attention": (FusedAttention(64, **kv, qk_norm="gemma", gate=True), (x, partial)),
        "delta_net": (GatedDeltaNet(64, 2, 4, 16, 8), (x,)),
        "delta_net_one_token": (GatedDeltaNet(64, 2, 4, 16, 8), (x[:, :1],)),
        "delta_net_interleaved": (GatedDeltaNet(64, 2, 4, 16, 8, layout="interleaved"), (x,)),
        "delta_net_tiled": (GatedDeltaNet(64, 2, 4, 16, 8, layout="tiled", one=False), (x,)),
        "moe": (SparseMoE(64, 4, 2, 32, shared=48), (x,)),
        "moe_one_token": (SparseMoE(64, 4, 2, 32, shared=48), (x[:1, :1],)),
        "norm": (AddRMSNorm(64, norm="gemma"), (x, x.flip(0))),
    }


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", modules())
def test_compile_in_one_graph(name):
    module, inputs = modules()[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert distance(first(compiled(*inputs)), first(module(*inputs))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_compile_with_inductor(name):
    module, inputs = modules()[name]
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        assert distance(first(compiled(*inputs)), first(module(*inputs))) <= 1e-5


@pytest.mark.parametrize("name", modules())
def test_export_strict(name):
    module, inputs = modules()[name]
    program = torch.export.export(module, inputs, strict=True)
    with torch.no_grad():
        assert distance(first(program.module()(*inputs)), first(module(*inputs))) <= 1e-6
    assert program.state_dict.keys() == module.state_dict().keys()
