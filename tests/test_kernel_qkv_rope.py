"""qkv_rope under Triton's interpreter, against float64; what the compiler makes of it; refusals."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import sass  # noqa: E402
from fuseweights.kernels.launch import KernelError  # noqa: E402
from fuseweights.kernels.qkv_rope import (  # noqa: E402
    Options,
    gate_view,
    qkv_rope,
    qkv_rope_cache,
    reference,
)
from gpu_qkv_rope import MODELS, Block, block_inputs, given, problems, wide  # noqa: E402

from fuseweights.nn import ops  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("model", MODELS)
def test_models(model):
    # the interpreter rounds to bfloat16 by truncation, so float16 stands for it
    assert problems(model, 2, 3, torch.float16, "cpu", strided=True) == []
    assert problems(model, 1, 1, torch.float32, "cpu") == []


@pytest.mark.parametrize("tokens", [2, 15, 63, 64, 65])
def test_tokens(tokens):
    assert problems("gpt-oss", 1, tokens, torch.float16, "cpu") == []


@pytest.mark.slow
def test_many_tokens():
    assert problems("glm4", 1, 1000, torch.float16, "cpu") == []


def test_no_tokens():
    assert problems("qwen3", 0, 3, torch.float16, "cpu") == []
    q, k, v = qkv_rope(torch.empty(2, 0, 4 * 64), 2, 1, 64)
    assert q.shape == (2, 2, 0, 64) and k.shape == v.shape == (2, 1, 0, 64)


@pytest.mark.parametrize("model", MODELS)
def test_reference_is_what_the_modules_compute(model):
    """The reference's parts are ops.rms_norm and ops.rotary, to the bit."""
    qkv, heads, kv_heads, d, cos, sin, q_weight, k_weight, eps, norm, rope, gate, v_norm = given(
        model, 2, 3, torch.bfloat16, "cpu"
    )
    q, k, v = qkv.tensor_split((heads * d * (1 + gate), heads * d * (1 + gate) + kv_heads * d), -1)
    v = v if v.shape[-1] else k
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if q_weight is not None:
        q = ops.rms_norm(q[..., :d], q_weight, eps, norm)
        k = ops.rms_norm(k, k_weight, eps, norm)
    if v_norm:
        v = ops.rms_norm(v, None, eps, norm)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cos is not None:
        q, k = ops.rotary(q, k, cos, sin, rope)
    arguments = qkv, heads, kv_heads, d, cos, sin, q_weight, k_weight, eps, norm, rope, gate, v_norm
    for ours, theirs in zip(reference(*arguments), (q, k, v), strict=True):
        assert torch.equal(ours, theirs)


def test_every_element_is_written():
    arguments = given("qwen3", 2, 3, torch.float16, "cpu")
    empty = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
        for out in qkv_rope(*arguments):
            assert out.isfinite().all()


def test_gate_is_a_view():
    qkv = torch.randn(2, 3, (2 * 4 + 2) * 64)
    gate = gate_view(qkv, 4, 64)
    assert gate.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    _, expected = qkv[..., : 8 * 64].unflatten(-1, (4, 128)).chunk(2, -1)
    assert torch.equal(gate, expected)


def test_positions_of_one_sequence_and_of_each():
    qkv = torch.randn(2, 3, 4 * 64)
    caches = torch.zeros(2, 2, 2, 1, 8, 64)
    qkv_rope_cache(qkv, *caches[0], torch.tensor([1, 5, 2]), 2, 1, 64)
    qkv_rope_cache(qkv, *caches[1], torch.tensor([[1, 5, 2]] * 2), 2, 1, 64)
    assert torch.equal(caches[0], caches[1]) and caches[0].any()


def test_rows_outside_of_the_cache_are_left_out():
    caches = torch.zeros(3, 1, 1, 8, 64)  # the first and the last are what lies around
    qkv_rope_cache(
        torch.randn(1, 3, 4 * 64), caches[1], caches[1], torch.tensor([-1, 8, 3]), 2, 1, 64
    )
    assert not caches[[0, 2]].any()
    assert caches[1, 0, 0].any(-1).tolist() == [row == 3 for row in range(8)]


def _arguments(**changes):
    qkv, *options = given("qwen3", 1, 2, torch.float16, "cpu")
    return {"qkv": qkv, **Options(*options)._asdict(), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qkv": torch.empty(2, 4096)}, r"qkv: expected \[B, T, W\], found \[2, 4096\]"),
        ({"qkv": torch.empty(1, 2, 4000)}, "qkv: expected 4096 columns, or 3072 .*found 4000"),
        ({"qkv": torch.empty(1, 2, 4096).double()}, "qkv: expected bfloat16, .*float64"),
        ({"qkv": torch.empty(1, 2, 8192)[..., ::2]}, "qkv: expected rows without gaps"),
        ({"norm": "layer"}, "norm: expected one of .*'layer'"),
        ({"rope": "yarn"}, "rope: expected one of .*'yarn'"),
        ({"sin": None}, "cos and sin: expected both or neither"),
        ({"cos": torch.empty(1, 3, 128)}, r"cos: .* even n ≤ 128\].*found \[1, 3, 128\]"),
        ({"sin": torch.empty(1, 2, 64)}, r"sin: expected .*found \[1, 2, 64\]"),
        ({"cos": torch.empty(1, 2, 130)}, r"cos: expected .*found \[1, 2, 130\]"),
        ({"q_weight": torch.empty(64)}, r"q_weight: expected \[128\], found \[64\]"),
        ({"k_weight": torch.empty(128, device="meta")}, "k_weight: expected on cpu, found on meta"),
        ({"cos": torch.empty(1, 2, 128, device="meta")}, "cos: expected on cpu, found on meta"),
    ],
)  # fmt: skip
def test_refuses(changes, message):
    with pytest.raises(KernelError, match=message):
        qkv_rope(**_arguments(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key_cache": torch.empty(8, 4, 128)}, r"key_cache: .*8, 'S', 128\], .*\[8, 4, 128\]"),
        ({"value_cache": torch.empty(1, 8, 5, 128)}, r"value_cache: expected \[1, 8, 4, 128\]"),
        ({"value_cache": torch.empty(1, 8, 4, 128)}, "value_cache: .*float16, .*float32"),
        ({"positions": torch.zeros(2).int()}, r"positions: expected int64 \[2\] .*int32"),
        ({"positions": torch.arange(3)}, r"positions: expected .*found .*\[3\]"),
        ({"positions": torch.arange(2, device="meta")}, "positions: .*on cpu"),
    ],
)  # fmt: skip
def test_cache_refuses(changes, message):
    arguments = _arguments()
    cache = torch.empty(1, arguments["kv_heads"], 4, 128, dtype=torch.float16)
    given = {"key_cache": cache, "value_cache": cache, "positions": torch.arange(2), **changes}
    with pytest.raises(KernelError, match=message):
        qkv_rope_cache(**arguments, **given)


# The registered operations


def test_opcheck():
    inputs = block_inputs("cpu")
    qkv, keys, values, positions, cos, sin, weight = inputs
    options = (4, 2, 64, cos, sin, weight, weight)
    torch.library.opcheck(torch.ops.fuseweights.qkv_rope.default, (qkv, *options))
    torch.library.opcheck(
        torch.ops.fuseweights.qkv_rope_cache.default, (qkv, keys, values, positions, *options)
    )


def test_cpu_reference_and_kernel_agree_through_the_module():
    inputs = block_inputs("cpu")
    q, k, v = Block()(*inputs)
    again, *_ = reference(*wide((inputs[0], 4, 2, 64, *inputs[4:6], inputs[6], inputs[6])))
    assert torch.allclose(q.double(), 2 * again, rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs[1][:, :, 5:8] + 1, k) and torch.equal(inputs[2][:, :, 5:8], v)


def test_compile_and_export():
    inputs = block_inputs("cpu")
    expected = Block()(*inputs)
    for run in (
        torch.compile(Block(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Block(), tuple(inputs)).module(),
    ):
        fresh = [torch.zeros_like(t) if i in (1, 2) else t for i, t in enumerate(inputs)]
        for ours, theirs in zip(run(*fresh), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(fresh[1], inputs[1]) and torch.equal(fresh[2], inputs[2])


# What the compiler makes of it


def test_compiled_for_hopper():
    for name, (kernel,) in sass.reports("sass_qkv_rope").items():
        assert kernel.spills == 0, name
        stores = {o: n for o, n in kernel.opcodes.items() if o.startswith("STG")}
        if name.startswith("qwen3.5"):  # 64 of a head's 256 are turned: less than 16 bytes a thread
            assert kernel.loads["128"] >= 5 and stores["STG.E.128"] >= 3, (name, stores)
        else:  # all but the two loads of a position
            assert set(kernel.loads) == {"64", "128"}, (name, kernel.loads)
            assert kernel.loads["64"] == 2 and set(stores) == {"STG.E.128"}, (name, stores)
