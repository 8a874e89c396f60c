"""linear.py and gated_mlp.py: the kernels in Triton's interpreter, and what compiles for Hopper.

bf16 is tested on a GPU (gpu_gated_mlp.py): the interpreter truncates where bf16 is stored.
"""

from __future__ import annotations

import itertools

import pytest
import sass
import torch
from fuseweights.kernels import gated_mlp, linear
from fuseweights.kernels.launch import KernelError
from torch import Tensor

KINDS = [
    linear.Rows(4, 4),
    linear.Rows(4, 1, 2),
    linear.Rows(2, 1, 2, programs=1),
    linear.Rows(2, 2, 1, programs=2),
    linear.Tiles(64, 128, 4, 3),
    linear.Tiles(16, 256, 1, 3),
]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape == exact.shape
    assert error(ours, exact) <= 1.1 * error(plain, exact)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


def assert_linear(x: Tensor, weight: Tensor, bias=None, residual=None, how=None) -> None:
    given = (x, weight, bias, residual)
    ours = linear.matvec(*given, how=how) if how else linear.linear_cuda(*given)
    exact = linear.linear_reference(*double(*given))
    assert_as_good(ours, linear.linear_reference(*given), exact)


def assert_gated_linear(x: Tensor, weight: Tensor, act: str, bias=None, how=None) -> None:
    if how:
        ours = linear.matvec(x, weight, bias, None, act, how)
    else:
        ours = gated_mlp.gated_linear_cuda(x, weight, act, bias)
    x64, weight64, bias64 = double(x, weight, bias)
    exact = gated_mlp.gated_linear_reference(x64, weight64, act, bias64)
    assert_as_good(ours, gated_mlp.gated_linear_reference(x, weight, act, bias), exact)


@pytest.mark.parametrize("how", KINDS, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 24, 512), (3, 11, 520)])
def test_every_kind_of_program_computes_the_product(monkeypatch, how, m, n, k):
    monkeypatch.setattr(linear, "_multiprocessors", lambda device: 2)  # many rounds a program
    x, weight = rand(m, k), rand(2 * n, k, scale=k**-0.5)
    assert_linear(x, weight, rand(2 * n), rand(m, 2 * n), how)
    assert_gated_linear(x, weight, "silu", rand(2 * n), how)


@pytest.mark.parametrize("m", [1, 2, 4, 5, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_x(m, dtype):
    x, weight = rand(m, 256, dtype=dtype), rand(64, 256, dtype=dtype, scale=0.06)
    assert_linear(x, weight)
    assert_gated_linear(x, weight, "silu")


@pytest.mark.parametrize("act", gated_mlp.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_activations_and_bias(act, with_bias):
    bias = rand(64) if with_bias else None
    assert_gated_linear(rand(2, 256), rand(64, 256, scale=0.06), act, bias)


def test_strided_operands_and_leading_dimensions():
    x = rand(2, 2, 300)[..., 20:276]
    weight = rand(96, 512, scale=0.06)[::2, :256]
    residual = rand(2, 2, 100)[..., :48]
    assert not (x.is_contiguous() or weight.is_contiguous() or residual.is_contiguous())
    assert_linear(x, weight, None, residual)
    assert_gated_linear(x, weight, "silu")
    assert_linear(rand(256, 3).T, weight)  # rows not in one piece are copied
    assert_linear(rand(3, 48), weight[:, :48].T.contiguous().T)  # columns in one piece: cuBLAS's


@pytest.mark.parametrize("k", [1, 8, 100, 4096, 5000])
def test_widths(k):
    assert_linear(rand(1, k), rand(3, k, scale=k**-0.5))
    assert_linear(rand(5, k), rand(3, k, scale=k**-0.5))


def test_every_element_is_written(monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **more: empty(*args, **more).fill_(torch.nan)
    )
    for how in KINDS:
        out = linear.matvec(rand(3, 96), rand(37, 96), None, None, None, how)
        assert out.isfinite().all()
    assert gated_mlp.gated_cuda(rand(3, 2 * 1025), "silu").isfinite().all()


def test_a_residual_is_added_before_rounding():
    """1 + 2⁻¹¹ + 2⁻²⁰ is above the middle between two float16s; the product alone, rounded, is not
    told from 2⁻¹¹ + nothing when 1 is added to it."""
    x, weight = torch.tensor([[2.0**-11, 2.0**-24]]).half(), torch.tensor([[1.0, 16.0]]).half()
    one = torch.ones(1, 1).half()
    assert linear.linear_cuda(x, weight, None, one).item() == 1 + 2.0**-10


@pytest.mark.parametrize("act", gated_mlp.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2 * 500), (2, 3, 2 * 1025), (65, 64)])
def test_gated(act, dtype, shape):
    gate_up = rand(*shape[:-1], shape[-1] + 6, dtype=dtype, scale=3)[..., : shape[-1]]
    exact = gated_mlp.gated_reference(gate_up.double(), act)
    assert_as_good(
        gated_mlp.gated_cuda(gate_up, act), gated_mlp.gated_reference(gate_up, act), exact
    )


def test_activations_far_out():
    """No NaN where exp overflows: act(±large) is 0 or the gate."""
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    for act, plain in gated_mlp.ACTIVATIONS.items():
        out = gated_mlp.gated_cuda(torch.cat((gate, torch.ones(7))), act)
        torch.testing.assert_close(out, plain(gate), rtol=1e-6, atol=1e-7)


def test_no_tokens():
    x, weight = rand(0, 64), rand(32, 64)
    assert linear.linear_cuda(x, weight).shape == (0, 32)
    assert gated_mlp.gated_linear_cuda(x, weight, "silu").shape == (0, 16)
    assert gated_mlp.gated_cuda(rand(0, 3, 64), "silu").shape == (0, 3, 32)


META = {"device": "meta", "dtype": torch.float16}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": rand(2, 65)}, r"x: expected \[\.\.\., 64\], found \[2, 65\]"),
        ({"x": rand(2, 64, dtype=torch.float32)}, "x: expected weight's torch.float16"),
        ({"weight": rand(64)}, r"weight: expected \[N, K\], found shape \[64\]"),
        ({"weight": torch.empty(32, 64, **META)}, "weight: expected on cpu, not meta"),
        ({"bias": rand(31)}, r"bias: expected \[32\], found \[31\]"),
        ({"bias": rand(32, dtype=torch.float32)}, "bias: expected torch.float16"),
        ({"bias": torch.empty(32, **META)}, "bias: expected on cpu, not meta"),
        ({"residual": rand(1, 32)}, r"residual: expected \[2, 32\], found \[1, 32\]"),
        ({"residual": rand(2, 32, dtype=torch.float32)}, "residual: expected torch.float16"),
        ({"act": "relu"}, "act: expected one of silu, gelu_tanh, gelu, found relu"),
        ({"act": "silu", "weight": rand(31, 64)}, r"weight: expected \[2I, K\], found \[31, 64\]"),
        ({"act": "silu", "x": rand(2, 65)}, r"x: expected \[\.\.\., 64\], found \[2, 65\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    given = {"x": rand(2, 64), "weight": rand(32, 64)} | changed
    gated = "act" in given
    for call in (
        (gated_mlp.gated_linear_cuda, gated_mlp.gated_linear)
        if gated
        else (linear.linear_cuda, linear.skinny_linear)
    ):
        with pytest.raises(KernelError, match=message):
            call(**given)


@pytest.mark.parametrize(
    "gate_up, act, message",
    [
        (rand(2, 5), "silu", r"gate_up: expected \[\.\.\., 2n\], found shape \[2, 5\]"),
        (rand(2, 4).int(), "silu", "gate_up: expected floating point, found torch.int32"),
        (rand(2, 4), "relu", "act: expected one of"),
    ],
)
def test_gated_refuses(gate_up, act, message):
    for call in (gated_mlp.gated_cuda, gated_mlp.gated):
        with pytest.raises(KernelError, match=message):
            call(gate_up, act)


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = torch.nn.Parameter(rand(64, 32, dtype=torch.float32), requires_grad=False)
        self.down = torch.nn.Parameter(rand(32, 32, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.fuseweights
        hidden = ops.gated_linear(x, self.gate_up, "silu") + ops.gated(x @ self.gate_up.T, "gelu")
        return ops.skinny_linear(hidden, self.down, None, x)


def test_compile_export_and_opcheck():
    module, x = MLP(), rand(3, 32, dtype=torch.float32)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    tokens = {"x": {0: torch.export.Dim("tokens")}}
    exported = torch.export.export(module, (x,), dynamic_shapes=tokens).module()
    torch.testing.assert_close(exported(x[:2]), module(x[:2]))
    torch.library.opcheck(gated_mlp.gated_linear, (x, module.gate_up, "silu"))
    torch.library.opcheck(linear.skinny_linear, (x, module.down, None, x))
    torch.library.opcheck(gated_mlp.gated, (x, "gelu"))


def test_the_pipeline_fits_into_shared_memory():
    """Of which a program can have 227 KiB on a Hopper GPU, whatever the shape."""
    for n, k, m in itertools.product((256, 4096, 6144, 200000), (512, 4096, 30000), range(1, 17)):
        for gated in (False, True):
            how = linear.config(n, k, m, 2, gated)
            if isinstance(how, linear.Tiles):
                columns = how.block_n * (1 + gated) + how.block_m
                assert how.stages * columns * how.block_k * 2 <= 227 << 10, (n, k, m, gated)


@pytest.fixture(scope="module")
def hopper():
    return sass.reports("sass_gated_mlp")


def test_shipped_programs_do_not_spill(hopper):
    for name, reports in hopper.items():
        assert reports and not any(report.spills for report in reports), name


def test_every_load_is_16_bytes(hopper):
    """Of weights and x; with _tiles into shared memory. A bias or residual is one number a row."""
    for name, (report,) in hopper.items():
        few = {"LDG.E.U16", "LDG.E"}
        loads = {op for op in report.opcodes if op.startswith(("LDG.", "LDGSTS."))}
        assert any("128" in op for op in loads), (name, loads)
        assert all("128" in op for op in loads - few), (name, loads)
