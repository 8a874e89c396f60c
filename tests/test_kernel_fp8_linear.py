"""kernels/fp8_linear.py: under Triton's interpreter, and as Hopper code.

Activations are float16: the interpreter cuts bfloat16 (tests/gpu_fp8_linear.py has it).
"""

from __future__ import annotations

import pytest
import sass
import torch
import torch.nn.functional as F
from fuseweights.kernels import fp8_linear as linear
from fuseweights.kernels import fp8_weights, quantize
from fuseweights.kernels.launch import KernelError

from fuseweights.nn.weights import Scaled

op = torch.ops.fuseweights
FP8 = torch.float8_e4m3fn
T = [1, 2, 15, 16, 63, 64, 65, pytest.param(1000, marks=pytest.mark.slow)]


MANY = 20


@pytest.fixture(autouse=True)
def big_tiles(monkeypatch):
    """The interpreter's time is a price for each program: here fewer, bigger ones."""
    monkeypatch.setattr(fp8_weights, "CONFIG", (64, 512, 4))
    monkeypatch.setattr(linear, "MATVEC", {(2**31, 2**31): (64, 512, 4)})
    monkeypatch.setattr(linear, "MATVEC_GATED", (32, 512, 4))
    torch.manual_seed(0)


@pytest.fixture
def many(monkeypatch):
    """So few tokens already dequantize and multiply, as a long prompt does."""
    monkeypatch.setattr(linear, "MOST", MANY - 1)


def weights(rows: int, columns: int, per: str = "block") -> tuple[torch.Tensor, torch.Tensor]:
    blocks = -(-columns // 128)
    shape = {"block": (-(-rows // 128), blocks), "group": (rows, blocks),
             "row": (rows, 1), "all": (1,)}[per]  # fmt: skip
    weight = (torch.randn(rows, columns) * 100).clamp(-448, 448).to(FP8)
    return weight, torch.rand(shape) * 1e-3 + 1e-4


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.double()


def as_exact(x, weight, scale, bias=None, residual=None, act=None) -> bool:
    """The launcher's result, no further from float64 than 1.1 × dequantize and multiply."""
    exact = linear.fp8_linear_reference(x.double(), weight, scale, wide(bias), wide(residual), act)
    plain = linear.fp8_linear_reference(x, weight, scale, bias, residual, act)
    ours = linear.fp8_linear_cuda(x, weight, scale, bias, residual, act)
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    return error(ours, exact) <= 1.1 * error(plain, exact)


# Against float64


@pytest.mark.parametrize("tokens", T)
@pytest.mark.parametrize("act", [None, "silu"])
def test_any_number_of_tokens(tokens, act):
    x = torch.randn(tokens, 256).half()
    assert as_exact(x, *weights(256, 256), act=act)


@pytest.mark.parametrize("tokens", [1, 3, MANY])
@pytest.mark.parametrize("per", ["block", "group", "row", "all"])
@pytest.mark.parametrize("rows, columns", [(200, 1112), (130, 48)])
def test_any_scales_of_ragged_weights(rows, columns, per, tokens, many):
    x = torch.randn(tokens, columns).half()
    weight, scale = weights(rows, columns, per)
    assert as_exact(x, weight, scale)


@pytest.mark.parametrize("tokens", [1, 3])
def test_bfloat16_scales(tokens):
    weight, scale = weights(200, 320)
    assert as_exact(torch.randn(tokens, 320).half(), weight, scale.to(torch.bfloat16))


@pytest.mark.parametrize("rows, columns", [(48, 256), (48, 4224)])
def test_the_shipped_tiles(rows, columns, monkeypatch):
    monkeypatch.undo()
    weight, scale = weights(rows, columns)
    expected = fp8_weights.dequantize_reference(weight, scale, torch.float16)
    assert torch.equal(fp8_weights.dequantize_cuda(weight, scale, torch.float16), expected)
    x = torch.randn(1, columns).half()
    assert as_exact(x, weight, scale)
    assert as_exact(x, weight, scale, act="silu")


@pytest.mark.parametrize("tokens", [1, 3, MANY])
@pytest.mark.parametrize("act", linear.ACTIVATIONS)
def test_bias_activation_and_residual(act, tokens, many):
    weight, scale = weights(256, 128)
    x, residual = torch.randn(tokens, 128).half(), torch.randn(tokens, 128).half()
    assert as_exact(x, weight, scale, torch.randn(256).half(), residual, act)
    assert as_exact(x, weight, scale, None, torch.randn(tokens, 256).half())


@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("act", [None, "silu"])
def test_split_along_k(tokens, act):
    """A narrow product of many columns: its parts are added by a second kernel."""
    weight, scale = weights(128, 4096)
    assert linear._config(tokens, 128, 4096, linear.PRODUCT)[3] > 1
    residual = torch.randn(tokens, 128 if act is None else 64).half()
    assert as_exact(torch.randn(tokens, 4096).half(), weight, scale, None, residual, act)


def test_every_e4m3_value_is_exact():
    """Against a one-hot x each weight comes back as stored · scale, of all 254 finite values."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    weight = codes.view(FP8)[:, None].expand(-1, 128).contiguous()
    scale = torch.full((2, 1), 0.5)
    x = torch.zeros(2, 128).half()
    x[:, 7] = 1
    for tokens in (1, 2):
        found = linear.fp8_linear_cuda(x[:tokens], weight, scale)
        assert torch.equal(found, (weight[:, 7].half() / 2).expand(tokens, -1))


@pytest.mark.parametrize("per", ["block", "row", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantize_is_the_modules_own(per, dtype):
    weight, scale = weights(200, 320, per)
    blocks = {"block": (128, 128), "row": (1, None), "all": (None, None)}[per]
    tensors = {"weight": weight, "weight_scale": scale}
    expected = Scaled(*blocks).dequantize(tensors, dtype)
    assert torch.equal(fp8_weights.dequantize_reference(weight, scale, dtype), expected)
    assert torch.equal(fp8_weights.dequantize_cuda(weight, scale, dtype), expected)


def test_no_tokens():
    weight, scale = weights(128, 256)
    x = torch.empty(0, 256).half()
    assert linear.fp8_linear_cuda(x, weight, scale).shape == (0, 128)
    q, s = quantize.quantize_fp8_reference(x, 128)
    assert linear.w8a8_cuda(q, s, weight, scale, None, torch.float16).shape == (0, 128)


@pytest.mark.parametrize("tokens", [1, 3])
def test_leading_dimensions_and_strides(tokens):
    weight, scale = weights(128, 256)
    x = torch.randn(2, tokens, 384).half()[..., 64:320]
    found = linear.fp8_linear_cuda(x, weight, scale)
    assert found.shape == (2, tokens, 128)
    assert torch.equal(found, linear.fp8_linear_cuda(x.contiguous(), weight, scale))
    rows = x[:, 0]  # a stride between rows
    assert torch.equal(linear.fp8_linear_cuda(rows, weight, scale), found[:, 0]) or tokens == 1


@pytest.mark.parametrize("tokens", [1, 2, MANY])
def test_every_output_is_written(tokens, many, monkeypatch):
    usual = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = usual(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.dtype != FP8 else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    weight, scale = weights(136, 320)
    x = torch.randn(tokens, 320).half()
    assert linear.fp8_linear_cuda(x, weight, scale, act="silu").isfinite().all()


# W8A8


@pytest.mark.parametrize("tokens", [1, 16, 65])
@pytest.mark.parametrize("group", [128, 0])
@pytest.mark.parametrize("per", ["block", "row", "all"])
def test_w8a8_is_exact_on_what_was_quantized(per, group, tokens):
    weight, scale = weights(200, 320, per)
    q, q_scale = quantize.quantize_fp8_reference(torch.randn(tokens, 320), group)
    bias = torch.randn(200).half()
    exact = linear.w8a8_reference(q, q_scale, weight, scale, bias, torch.float64)
    found = linear.w8a8_cuda(q, q_scale, weight, scale, bias, torch.float16)
    assert error(found, exact) <= 1.1 * error(exact.half(), exact)


@pytest.mark.parametrize("group", [128, 0])
def test_w8a8_has_the_stated_error(group):
    """2.6e-2 of Gaussian activations, from rounding them to E4M3."""
    weight, scale = weights(256, 1024)
    x = torch.randn(64, 1024)
    q, q_scale = quantize.quantize_fp8_reference(x, group)
    found = linear.w8a8_cuda(q, q_scale, weight, scale, None, torch.float32)
    exact = linear.fp8_linear_reference(x.double(), weight, scale)
    assert 2.4e-2 < error(found, exact) < 2.8e-2


# What is refused


def refused(match: str, *args, **kwargs) -> None:
    with pytest.raises(KernelError, match=match):
        linear.fp8_linear_cuda(*args, **kwargs)


X = torch.ones(2, 256).half()


def test_refuses_a_float32_x():
    refused("x: .*float32", X.float(), *weights(128, 256))


def test_refuses_an_x_of_another_width():
    refused(r"x: expected \[..., 256\]", torch.ones(2, 128).half(), *weights(128, 256))


def test_refuses_another_format():
    refused("weight: .*float8_e5m2", X, torch.ones(128, 256).to(torch.float8_e5m2), torch.ones(1))


def test_refuses_strided_weights():
    weight, scale = weights(128, 512)
    refused("weight: expected contiguous", X, weight[:, :256], scale[:, :2])


def test_refuses_scales_of_another_shape():
    refused(r"scale: .*found \[3, 2\]", X, weights(128, 256)[0], torch.ones(3, 2))


def test_refuses_scales_of_another_dtype():
    refused("scale: .*float16", X, weights(128, 256)[0], torch.ones(1, 2).half())


def test_refuses_another_device():
    weight, scale = weights(128, 256)
    refused("scale: expected on cpu", X, weight, scale.to("meta"))


def test_refuses_an_unknown_activation():
    refused("act: .*relu", X, *weights(128, 256), act="relu")


def test_refuses_half_a_pair_of_rows():
    refused("129 rows", X, *weights(129, 256), act="silu")


def test_refuses_a_bias_of_another_width():
    refused(r"bias: expected \[128\]", X, *weights(128, 256), torch.ones(64).half())


def test_refuses_a_residual_of_another_shape():
    refused(r"residual: .*\[2, 128\]", X, *weights(128, 256), None, torch.ones(2, 256).half())


def test_w8a8_refuses_what_is_not_quantized():
    weight, scale = weights(128, 256)
    with pytest.raises(KernelError, match="q: "):
        linear.w8a8_cuda(X, torch.ones(2, 2), weight, scale, None, torch.float16)
    with pytest.raises(KernelError, match="q_scale: "):
        linear.w8a8_cuda(X.to(FP8), torch.ones(2, 3), weight, scale, None, torch.float16)


# Through the registered operations


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight, scale = weights(256, 256)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x):
        y = op.fp8_linear(x, self.weight, self.scale, act="silu")
        z = op.fp8_linear_w8a8(*op.quantize_fp8(x, 128), self.weight, self.scale, None, x.dtype)
        return y, z, F.linear(x, op.dequantize_fp8(self.weight, self.scale, x.dtype))


@pytest.mark.parametrize("how", ["compile", "export"])
def test_compile_and_export(how):
    layer, x = Layer(), torch.randn(3, 256)
    if how == "compile":
        module = torch.compile(layer, fullgraph=True, backend="aot_eager")
    else:
        module = torch.export.export(layer, (x,)).module()
    assert all(map(torch.equal, module(x), layer(x)))


def test_opcheck():
    weight, scale = weights(128, 256)
    x = torch.randn(2, 3, 256)
    q, q_scale = quantize.quantize_fp8_reference(x, 128)
    # test_schema compares inputs before and after by allclose, which torch has not for FP8
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operation, args in (
        (op.fp8_linear, (x, weight, scale, torch.randn(128), torch.randn(2, 3, 128))),
        (op.fp8_linear, (x, weight, scale, None, None, "gelu")),
        (op.fp8_linear_w8a8, (q, q_scale, weight, scale, None, torch.float32)),
        (op.dequantize_fp8, (weight, scale, torch.float32)),
    ):
        torch.library.opcheck(operation.default, args, test_utils=tests)


# As Hopper code


@pytest.fixture(scope="module")
def hopper():
    return {name: {r.kernel: r for r in rs} for name, rs in sass.reports("sass_fp8_linear").items()}


def test_nothing_spills(hopper):
    spills = {(name, k): r.spills for name, rs in hopper.items() for k, r in rs.items()}
    assert {case: n for case, n in spills.items() if n} == {}


@pytest.mark.parametrize("name", ["gate_up 1", "down 1", "qkv 1", "all 1"])
def test_a_matvec_reads_16_weights_at_a_time_in_few_instructions(hopper, name):
    """Half an unpacking, a conversion to float32 and a multiplication a weight; all the rest, with
    loads, addresses and the sums at the end, at most two more."""
    report = hopper[name]["matvec"]
    weights = 16 * report.opcodes["LDG.E.EF.128"]
    assert report.opcodes["F2FP.F16.E4M3.UNPACK_B"] == weights // 2
    assert report.opcodes["FFMA"] >= weights
    assert report.instructions <= 5 * weights


def test_products_are_on_the_tensor_cores(hopper):
    for name, kind in (("gate_up 16", "HMMA"), ("gate_up 128", "HGMMA"), ("w8a8 2048", "QGMMA")):
        assert any(op.startswith(kind) for op in hopper[name]["product"].opcodes), name
