"""kernels/gguf_*.py: the formats against gguf-py, the kernels under Triton's interpreter, and as
Hopper code.

float32 and float16 only: the interpreter cuts bfloat16 where a GPU rounds (tests/gpu_gguf_linear.py
has bfloat16, and realistic sizes).
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import sass
import torch
from fuseweights.kernels import gguf_linear as linear
from fuseweights.kernels import gguf_types
from fuseweights.kernels.gguf_blocks import DECODERS
from fuseweights.kernels.gguf_experts import experts_cuda, experts_reference
from fuseweights.kernels.gguf_linear import Matrix, Vector
from fuseweights.kernels.gguf_types import TYPES, planar, raw
from fuseweights.kernels.launch import KernelError
from ggml_random import random_blocks

op = torch.ops.fuseweights
NAMES = {kind.name: number for number, kind in TYPES.items()}
Q4_0, Q8_0, Q4_K, Q6_K = (NAMES[name] for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K"))
#: What is always run; the interpreter takes seconds a type.
FEW = {Q4_0, Q4_K, Q6_K}
EVERY = [
    pytest.param(number, id=kind.name, marks=[] if number in FEW else pytest.mark.slow)
    for number, kind in TYPES.items()
]
ALL = [pytest.param(number, id=kind.name) for number, kind in TYPES.items()]
LAYOUTS = [pytest.param(False, id="raw"), pytest.param(True, id="planar")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def weights(type: int, blocks: torch.Tensor) -> torch.Tensor:
    """float64, by gguf-py, of raw blocks."""
    kind = gguf.GGMLQuantizationType(type)
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)).double()


# Formats


def test_the_table_is_gguf_pys():
    for number, kind in TYPES.items():
        named = gguf.GGMLQuantizationType(number)
        assert named.name == kind.name
        assert gguf.GGML_QUANT_SIZES[named] == (kind.weights, kind.bytes)
        decoder = DECODERS[number]
        assert 32 * decoder.groups * decoder.units == kind.weights


@pytest.mark.parametrize("type", ALL)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_reference_equals_gguf_py(type, blocks):
    columns = blocks * TYPES[type].weights
    stored = random_blocks(type, 2, 5, columns)
    named = gguf.GGMLQuantizationType(type)
    expected = gguf.quants.dequantize(stored.numpy(), named)
    got = gguf_types.dequantize(stored, type, columns).numpy()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert np.isfinite(got).all() and got.std() > 0


@pytest.mark.parametrize("type", ALL)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_planar_keeps_every_bit(type, blocks):
    columns = blocks * TYPES[type].weights
    stored = random_blocks(type, 3, 5, columns)
    moved = planar(stored, type, columns)
    assert moved.shape[-1] % 16 == 0
    assert torch.equal(raw(moved, type, columns), stored)
    assert torch.equal(moved[1, 2:4], planar(stored[1, 2:4], type, columns))
    same = gguf_types.dequantize(moved, type, columns, True)
    assert torch.equal(same, gguf_types.dequantize(stored, type, columns))


# Kernels

#: One block of 256 or, of 32, a number of blocks that no vector's size divides.
COLUMNS = {number: 256 if kind.weights == 256 else 96 for number, kind in TYPES.items()}


def product(x, type, blocks, is_planar=False, **options):
    rows = x.shape[0] if isinstance(x, torch.Tensor) else x[0].shape[0]
    width = blocks.shape[0] // (2 if options.get("act") else 1)
    return linear.multiply(x, blocks, poisoned(rows, width), type, is_planar, **options)


@pytest.mark.parametrize("is_planar", LAYOUTS)
@pytest.mark.parametrize("type", EVERY)
def test_dequantize(type, is_planar):
    columns = COLUMNS[type]
    stored = random_blocks(type, 5, columns)
    blocks = planar(stored, type, columns) if is_planar else stored
    got = linear.dequantize_cuda(blocks, type, columns, torch.float32, is_planar)
    assert torch.equal(got, gguf_types.dequantize(stored, type, columns))


@pytest.mark.parametrize("is_planar", LAYOUTS)
@pytest.mark.parametrize("type", EVERY)
def test_exact(type, is_planar):
    """Dequantized weights times x in float32: 1.1 × the error of PyTorch's float32 product."""
    columns = 1024 if TYPES[type].weights == 256 else 992
    stored = random_blocks(type, 5, columns)
    blocks = planar(stored, type, columns) if is_planar else stored
    x = torch.randn(2, columns + 3)[:, 3:]
    exact = x.double() @ weights(type, stored).T
    plain = error(x @ weights(type, stored).float().T, exact)
    assert error(product(x, type, blocks, is_planar), exact) <= 1.1 * plain


HOW = [
    pytest.param(1, Vector(), id="vector"),
    pytest.param(1, Vector(rows=2, programs=1), id="loop"),
    pytest.param(3, Matrix(), id="matrix"),
    pytest.param(11, Matrix(ahead=False), id="two-columns"),
]


@pytest.mark.parametrize("m, how", HOW)
@pytest.mark.parametrize("type", EVERY)
def test_quantized(type, m, how):
    """Integer sums are exact and each group's is scaled in float32: the error against what was
    quantized is float32's, whatever the kernel."""
    columns = COLUMNS[type]
    stored = random_blocks(type, 5, columns)
    blocks = planar(stored, type, columns) if TYPES[type].has_planar else stored
    given = linear.quantize_q8_1(torch.randn(m, columns))
    x = linear._dequantized_q8_1(given[0].double(), given[1].double())
    exact = x @ weights(type, stored).T
    plain = error(x.float() @ weights(type, stored).float().T, exact)
    out = product(given, type, blocks, TYPES[type].has_planar, how=how)
    assert error(out, exact) <= 1.1 * max(plain, 1.5e-7)


def test_quantized_activations_cost_what_llama_cpps_do():
    """At most 7e-3 of the largest result: the rounding of x to 8 bits, which llama.cpp does too."""
    stored = random_blocks(Q8_0, 256, 2048)
    x = torch.randn(4, 2048)
    q, d, _ = linear.quantize_q8_1(x)
    exact = x.double() @ weights(Q8_0, stored).T
    out = linear._dequantized_q8_1(q, d).double() @ weights(Q8_0, stored).T
    assert 1e-4 < float((out - exact).abs().max() / exact.abs().max()) < 7e-3


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("m", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("act", [None, "silu", "gelu_tanh", "gelu"])
def test_epilogue(act, m, quantized):
    blocks = random_blocks(Q4_0, 34, 64)
    x, bias = torch.randn(m, 64), torch.randn(34)
    residual = torch.randn(m, 40)[:, 3 : 3 + (17 if act else 34)]
    given = linear.quantize_q8_1(x) if quantized else x
    wide = linear._dequantized_q8_1(*given[:2]) if quantized else x
    options = {"bias": bias, "act": act, "residual": residual}
    wide_options = {name: t.double() if name != "act" else t for name, t in options.items()}
    exact = linear.linear_reference(wide.double(), blocks, Q4_0, False, **wide_options)
    plain = error(linear.linear_reference(wide, blocks, Q4_0, False, **options), exact)
    assert error(product(given, Q4_0, blocks, **options), exact) <= 1.1 * max(plain, 1e-7)


@pytest.mark.parametrize(
    "m", [1, 2, *(pytest.param(m, marks=pytest.mark.slow) for m in (8, 15, 32)), 33, 64]
)
def test_any_number_of_rows(m):
    """The launcher's choice of kernel; float16 in and out; x with any strides."""
    stored = random_blocks(Q8_0, 5, 96)
    x = torch.randn(96, m + 1).half().T[:m]
    out = linear.linear_cuda(x, planar(stored, Q8_0, 96), Q8_0, True, exact=True)
    exact = x.double() @ weights(Q8_0, stored).T
    assert out.dtype == torch.float16 and out.shape == (m, 5)
    assert error(out, exact) <= 1.1 * error(exact.half(), exact)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 1, 3)])
def test_leading_dimensions(shape):
    blocks = random_blocks(Q4_0, 2, 32)
    x = torch.randn(*shape, 32)
    out = linear.linear_cuda(x, blocks, Q4_0, exact=True)
    torch.testing.assert_close(out, linear.linear_reference(x, blocks, Q4_0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 2, 15, 64])
def test_quantized_op(m):
    blocks = random_blocks(Q8_0, 5, 96)
    given = linear.quantize_q8_1(torch.randn(m, 96))
    out = linear.q8_1_cuda(*given, blocks, Q8_0, torch.float32)
    expected = linear.q8_1_reference(*given, blocks, Q8_0, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


# Experts


@pytest.mark.parametrize("exact", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "first, second, width",
    [(Q8_0, Q4_0, 32), pytest.param(Q4_K, Q6_K, 256, marks=pytest.mark.slow)],
)
def test_experts(first, second, width, exact):
    columns = TYPES[first].weights
    gate_up = random_blocks(first, 3, 2 * width, columns)
    down = random_blocks(second, 3, columns, width)
    tokens = 2 if exact else 1  # a program is a tenth of a second here
    x, index = torch.randn(tokens, columns), torch.tensor([[2, 0], [1, 1]])[:tokens]
    scores = torch.rand(tokens, 2)
    expected = experts_reference(
        x.double(), index, scores.double(), gate_up, first, down, second, "silu"
    )
    down = planar(down, second, width)
    gate_up = planar(gate_up, first, columns)
    out = experts_cuda(x, index, scores, gate_up, first, down, second, "silu", True, exact)
    # both activations rounded to 8 bits, in llama.cpp too
    assert error(out, expected) <= (3e-7 if exact else 1.5e-2)


# Hopper code

#: Instructions a weight, prologue and epilogue included: 10 % above what Triton 3.6 and 3.7 make.
#: At M = 1 a lane multiplies 128 weights of two rows, gate and up (4096 / 32).
PER_WEIGHT = {
    **{"Q4_0": 2.1, "Q4_1": 1.9, "Q5_0": 3.3, "Q5_1": 3.0, "Q8_0": 1.35, "Q2_K": 2.2, "Q3_K": 2.9},
    **{"Q4_K": 2.2, "Q5_K": 2.9, "Q6_K": 2.7, "IQ4_NL": 3.7, "IQ4_XS": 4.1, "MXFP4": 3.8},
}


def look(reports: dict[str, list[sass.Report]]) -> None:
    for case, kernels in reports.items():
        for report in kernels:
            assert report.spills == 0, case
            assert report.loads.get("128", 0) >= 2 or report.kernel == "matrix_kernel", case
            assert report.loads.get("8", 0) == 0 or case.startswith("MXFP4"), case
        name, _, shape = case.partition(" ")
        if shape == "gate_up M=1":
            (report,) = kernels
            assert report.instructions / 256 <= PER_WEIGHT[name], case
            resident = linear.RESIDENT[NAMES[name]][True]
            assert -(-report.registers // 8) * 8 * 32 * resident <= 65536, case
        if shape == "qkv M=1":
            (report,) = kernels
            resident = linear.RESIDENT[NAMES[name]][False]
            assert -(-report.registers // 8) * 8 * 32 * resident <= 65536, case
        if name == "Q4_K" and shape == "gate_up M=8":  # 256 weights a lane and step
            (report,) = kernels
            assert report.opcodes["IMMA.16832.S8.S8"] == 16
            assert report.instructions / 256 <= 4.7


def test_hopper_code():
    look(sass.reports("sass_gguf_linear"))


@pytest.mark.slow
def test_hopper_code_of_every_type():
    look(sass.reports("sass_gguf_types"))


# Refusals


def refused(what, *args, **kwargs):
    with pytest.raises(KernelError, match=what):
        op.gguf_linear(*args, **kwargs)


def test_refusals():
    blocks, x = random_blocks(Q4_K, 4, 512), torch.randn(2, 512)
    refused("blocks of 256", x[:, :500], blocks, Q4_K)
    refused("uint8 .N, 144", x[:, :256], blocks, Q4_K)
    refused("found torch.int8", x, blocks.view(torch.int8), Q4_K)
    refused("planar", x, random_blocks(Q6_K, 4, 512), Q6_K, True)
    refused("scalar", torch.tensor(1.0), blocks, Q4_K)
    # by us, or by gguf-py where fuseweights.nn has brought its fallback
    with pytest.raises(ValueError, match=r"type 999|999 is not a valid"):
        op.gguf_linear(x, blocks, 999)
    refused("act", x, blocks, Q4_K, act="relu")
    refused("2I rows", x, blocks[:3], Q4_K, act="silu")
    refused("bias", x, blocks, Q4_K, bias=torch.randn(5))
    refused("bias", x, blocks, Q4_K, bias=torch.ones(4, dtype=torch.int32))
    refused("residual", x, blocks, Q4_K, residual=torch.randn(2, 5))
    with pytest.raises(KernelError, match="meta"):
        linear.linear_cuda(x, blocks.to("meta"), Q4_K)


def test_refusals_of_quantized_activations():
    blocks, (q, d, s) = random_blocks(Q4_K, 4, 256), op.quantize_q8_1(torch.randn(2, 256))
    for what, args in {
        "q: expected int8": (q.float(), d, s),
        "d: expected float32": (q, d.half(), s),
        "s: expected float32": (q, d, s[:, :4]),
    }.items():
        with pytest.raises(KernelError, match=what):
            op.gguf_linear_q8_1(*args, blocks, Q4_K, torch.float32)


@pytest.mark.parametrize(
    "what, change",
    [
        ("x: expected", {"x": torch.randn(1, 2, 32)}),
        ("act", {"act": "relu"}),
        ("gate_up", {"gate_up": random_blocks(Q8_0, 3, 63, 32)}),
        ("E, N", {"gate_up": random_blocks(Q8_0, 64, 32)}),
        ("down", {"down": random_blocks(Q8_0, 3, 31, 32)}),
        ("index, scores", {"index": torch.zeros(2, 3, dtype=torch.int64)}),
        ("index, scores", {"index": torch.zeros(2, 2)}),
    ],
)
def test_refusals_of_experts(what, change):
    args = {
        "x": torch.randn(2, 32),
        "index": torch.zeros(2, 2, dtype=torch.int64),
        "scores": torch.rand(2, 2),
        "gate_up": random_blocks(Q8_0, 3, 64, 32),
        "gate_up_type": Q8_0,
        "down": random_blocks(Q8_0, 3, 32, 32),
        "down_type": Q8_0,
        "act": "silu",
    }
    assert op.gguf_experts(**args).shape == (2, 32)
    with pytest.raises(KernelError, match=what):
        op.gguf_experts(**args | change)


def test_other_types_are_dequantized_with_a_warning():
    from fuseweights.nn import weights as formats  # registers the fallback

    kind = gguf.GGMLQuantizationType.TQ1_0
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quants.quantize(values, kind))
    linear._warned.discard(int(kind))
    x = torch.randn(2, 256)
    with pytest.warns(UserWarning, match="no kernels"):
        out = op.gguf_linear(x, blocks, int(kind))
    expected = x @ formats.GGUFBlocks(int(kind)).dequantize({"weight": blocks}, torch.float32).T
    torch.testing.assert_close(out, expected)


# torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gate_up", random_blocks(Q4_K, 8, 256, seed=1))
        self.register_buffer("norm_out", random_blocks(Q8_0, 3, 256, seed=2))

    def forward(self, x):
        y = op.gguf_linear(x, self.gate_up, Q4_K, act="silu")
        z = op.gguf_linear_q8_1(*op.quantize_q8_1(x), self.norm_out, Q8_0, x.dtype)
        w = op.gguf_dequantize(self.norm_out, Q8_0, 256, x.dtype)
        return torch.cat((y, z, x @ w.T), -1)


def test_compiles_and_exports():
    layer, x = Layer(), torch.randn(3, 256)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_opcheck():
    blocks, x = random_blocks(Q4_K, 4, 256), torch.randn(2, 256)
    torch.library.opcheck(op.gguf_linear, (x, blocks, Q4_K), {"act": "gelu"})
    given = (*op.quantize_q8_1(x), blocks, Q4_K, torch.float16)
    torch.library.opcheck(op.gguf_linear_q8_1, given)
    torch.library.opcheck(op.gguf_dequantize, (blocks, Q4_K, 256, torch.float32))
    experts = random_blocks(Q8_0, 2, 64, 32), Q8_0, random_blocks(Q8_0, 2, 32, 32), Q8_0, "silu"
    index = torch.tensor([[0, 1]])
    torch.library.opcheck(op.gguf_experts, (torch.randn(1, 32), index, torch.rand(1, 2), *experts))
