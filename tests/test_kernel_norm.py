"""kernels/norm.py and kernels/quantize.py: under Triton's interpreter, and as Hopper code.

float16 and float32 only: the interpreter cuts bfloat16 where a GPU rounds (tests/gpu_norm.py has
bfloat16).
"""

from __future__ import annotations

import pytest
import sass
import torch
from fuseweights.kernels import norm as norms
from fuseweights.kernels import quantize
from fuseweights.kernels.launch import KernelError

from fuseweights.nn import ops

op = torch.ops.fuseweights
EPS = 1e-6
T = [1, 2, 15, 63, 64, 65, pytest.param(1000, marks=pytest.mark.slow)]
WIDTHS = [32, 100, 128, 320, 4096, pytest.param(16384, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN (bytes 255): an element that nothing writes is found."""

    def poisoned(like):
        def make(*args, **kwargs):
            out = like(*args, **kwargs)
            for t in out if isinstance(out, tuple) else (out,):
                t.view(torch.uint8).fill_(255)
            return out

        return make

    for module in (norms, quantize):
        monkeypatch.setattr(module, "quantized_like", poisoned(quantize.quantized_like))
    monkeypatch.setattr(norms, "_outputs", poisoned(norms._outputs))
    torch.manual_seed(0)


def data(*rows: int, width: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    x, other, w = (torch.randn(*shape, width) for shape in (rows, rows, ()))
    return [t.to(dtype) for t in (3 * x, other, 1 + w / 4)]


def launched(kind: str, *args, form: str = "plain", group: int = 0):
    """What the launcher of `kind` returns, its kernel run by the interpreter."""
    if kind == "rms_norm":
        x, w, norm = args
        out = norms._run(x, w, EPS, norm, form, group)
    elif kind == "gated_rms_norm":
        x, gate, w = args
        out = norms._run(x, w, EPS, "late", form, group, gate=gate)
    else:
        x, residual, w, norm = args
        out = norms._run(x, w, EPS, norm, form, group, residual=residual,
                         in_place=kind == "add_rms_norm_")  # fmt: skip
    return out if len(out) > 1 else out[0]


def as_exact(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """No further from float64 than 1.1 × PyTorch. In float32 a row's error is that of its one
    scale, a draw of luck in a few rows: there, four roundings (sum, root, two products)."""
    ours, plain = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, plain))
    return ours <= max(1.1 * plain, 4 * 2**-24)


def same(found, expected) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) and all(
        torch.equal(a.float(), b.float()) for a, b in pairs
    )


# Against float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("norm", norms.CONVENTIONS)
def test_as_exact_as_pytorch(norm, width, dtype):
    x, other, w = data(5, width=width, dtype=dtype)
    wide = [t.double() for t in (x, other, w)]
    plain = norms.rms_norm_reference(x, w, EPS, norm)
    exact = norms.rms_norm_reference(wide[0], wide[2], EPS, norm)
    assert as_exact(launched("rms_norm", x, w, norm), plain, exact)
    ours, total = launched("add_rms_norm", x, other, w, norm)
    plain, sums = norms.add_rms_norm_reference(x, other, w, EPS, norm)
    assert torch.equal(total, sums)
    exact = norms.rms_norm_reference(sums.double(), wide[2], EPS, norm)
    assert as_exact(ours, plain, exact)
    plain = norms.gated_rms_norm_reference(x, other, w, EPS)
    exact = norms.gated_rms_norm_reference(*wide, EPS)
    assert as_exact(launched("gated_rms_norm", x, other, w), plain, exact)


@pytest.mark.parametrize("tokens", T)
def test_any_number_of_tokens(tokens):
    x, other, w = data(tokens, width=320)
    expected = norms.add_rms_norm_reference(x, other, w, EPS, "llama")
    found = launched("add_rms_norm", x, other, w, "llama")
    # equal, but where a last bit of the float32 mean moves a value across a float16 boundary, and
    # the llama convention's second rounding moves it once more
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=2 * 2**-10, atol=0)
    assert (found[0] != expected[0]).float().mean() < 1e-3


def test_no_tokens():
    x, other, w = data(0, width=128)
    assert launched("add_rms_norm", x, other, w, "llama")[0].shape == (0, 128)
    assert quantize.launch_quantize(x, 128)[1].shape == (0, 1)


def test_the_statistics_are_those_of_the_stored_total():
    """x is lost from the float16 total, and would be a hundredth of the exact one's mean square."""
    residual = torch.full((1, 64), 1.0).half()
    x = torch.full((1, 64), 2**-12).half()
    x[:, ::2], residual[:, ::2] = 2**-4, 1024
    w = torch.ones(64).half()
    y, total = launched("add_rms_norm", x, residual, w, "late")
    assert torch.equal(total, residual)
    assert torch.equal(y, norms.rms_norm_reference(total, w, EPS, "late"))


def test_a_wide_gated_input():
    """The delta rule's output is float32; the result has the gate's dtype."""
    x, gate, w = data(3, 4, width=128, dtype=torch.float32)
    y = launched("gated_rms_norm", x, gate.half(), w)
    expected = norms.gated_rms_norm_reference(x, gate.half(), w, EPS)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=2**-10, atol=0)


def test_without_a_weight():
    x = data(3, width=256)[0]
    expected = norms.rms_norm_reference(x, None, EPS, "late")
    torch.testing.assert_close(launched("rms_norm", x, None, "late"), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("weight", [torch.float16, torch.float32])
@pytest.mark.parametrize("norm", norms.CONVENTIONS)
def test_the_references_are_those_of_the_modules(norm, weight):
    x, other, w = data(3, width=64)
    w = w.to(weight)
    assert torch.equal(norms.rms_norm_reference(x, w, EPS, norm), ops.rms_norm(x, w, EPS, norm))
    ours = norms.add_rms_norm_reference(x, other, w, EPS, norm)
    assert all(map(torch.equal, ours, ops.add_rms_norm(x, other, w, EPS, norm)))
    ours = norms.gated_rms_norm_reference(x, other, w, EPS)
    assert torch.equal(ours, ops.gated_rms_norm(x, other, w, EPS))


# Strides, and in place


def test_in_place():
    x, other, w = data(5, width=320)
    y, total = launched("add_rms_norm", x, other, w, "gemma")
    found, written = launched("add_rms_norm_", x, other, w, "gemma")
    assert written is other
    assert torch.equal(other, total) and torch.equal(found, y)


def test_any_row_stride_and_nothing_outside_is_written():
    wide = torch.randn(7, 3, 320).half()
    before = wide.clone()
    x, residual = before[:, 1, 32:288], wide[:, 2, :256]
    w = data(1, width=256)[2]
    expected = launched("add_rms_norm", x.contiguous(), residual.contiguous(), w, "llama")
    assert torch.equal(launched("add_rms_norm_", x, residual, w, "llama")[0], expected[0])
    assert torch.equal(residual, expected[1])
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 2, 256:], before[:, 2, 256:])


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_per_head_out_of_a_fused_projection(heads):
    qkv = torch.randn(2, 5, 16 * 128).half()
    w = data(1, width=128)[2]
    x = qkv.view(2, 5, 16, 128)[:, :, 4 : 4 + heads]
    for rows in (x, x.transpose(1, 2)):  # the second merges into no two dimensions
        expected = launched("rms_norm", rows.contiguous(), w, "gemma")
        assert torch.equal(launched("rms_norm", rows, w, "gemma"), expected)


def test_columns_apart():
    x = torch.randn(64, 3).half().t()
    found, expected = (launched("rms_norm", t, None, "late") for t in (x, x.contiguous()))
    assert torch.equal(found, expected)


# Quantized


@pytest.mark.parametrize("form, group", [("fp8", 128), ("fp8", 0), ("q8_1", None)])
@pytest.mark.parametrize("width", [32, 320, 4096])
@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "gated_rms_norm"])
def test_quantized_is_the_plain_one_quantized(kind, width, form, group):
    x, other, w = data(3, width=width)
    args = {"rms_norm": (x, w, "llama"), "add_rms_norm": (x, other, w, "llama"),
            "gated_rms_norm": (x, other, w)}[kind]  # fmt: skip
    plain = launched(kind, *args)
    plain, total = plain if kind == "add_rms_norm" else (plain, None)
    found = launched(kind, *args, form=form, group=group or 0)
    expected = norms._reference(plain, form, group or 0)
    assert same(found, expected if total is None else (*expected, total))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 32), (3, 128), (2, 5, 1056), (65, 320), (2, 4096)])
def test_quantize_agrees_with_its_reference_bit_for_bit(shape, dtype):
    x = (torch.randn(shape) * 3).to(dtype)
    x[..., :32] = 0
    for group in (128, 0):
        found = quantize.launch_quantize(x, group)
        assert same(found, quantize.quantize_fp8_reference(x, group))
    assert same(quantize.launch_quantize(x, None), quantize.quantize_q8_1_reference(x))


def test_quantize_reads_strided_rows():
    x = torch.randn(6, 4, 384).half()[:, :, 128:256].transpose(0, 1)
    assert same(quantize.launch_quantize(x, 128), quantize.quantize_fp8_reference(x, 128))


def test_q8_1_rounds_halves_away_from_zero():
    """amax 127 makes d one. 0.49999997 is below a half: adding a half would round it to one."""
    x = torch.zeros(1, 32)
    x[0, :7] = torch.tensor([127, 0.5, -0.5, 1.5, -2.5, 0.49999997, 126.5])
    q, d, s = quantize.launch_quantize(x, None)
    assert q[0, :7].tolist() == [127, 1, -1, 2, -3, 0, 127]
    assert d.item() == 1 and s.item() == 127 + 1 - 1 + 2 - 3 + 127


def test_q8_1_is_within_half_a_step():
    x = torch.randn(4, 256)
    q, d, s = quantize.launch_quantize(x, None)
    back = (q.unflatten(-1, (-1, 32)) * d[..., None]).flatten(-2)
    assert ((back - x).abs() <= 0.5001 * d.repeat_interleave(32, -1)).all()
    torch.testing.assert_close(s, back.unflatten(-1, (-1, 32)).sum(-1), rtol=1e-5, atol=1e-4)


def test_fp8_is_within_half_a_unit():
    """E4M3 has three bits after the first: 2⁻⁴ of a value, 2⁻¹⁰ of a scale near zero."""
    x = torch.randn(4, 256)
    q, scale = quantize.launch_quantize(x, 128)
    steps = scale.repeat_interleave(128, -1)
    assert ((q.float() * steps - x).abs() <= x.abs() * 2**-4 * 1.0001 + steps * 2**-10).all()
    assert q.float().abs().amax(-1).eq(448).all()


@pytest.mark.parametrize("value", [0.0, 1e-31])
def test_groups_of_nothing_are_zeros(value):
    x = torch.full((1, 128), value)
    for group in (128, 0, None):
        assert all((t.float() == 0).all() for t in quantize.launch_quantize(x, group))


# What is refused


def refused(match: str, call, *args, **kwargs) -> None:
    with pytest.raises(KernelError, match=match):
        call(*args, **kwargs)


def test_refuses_a_double():
    refused("x: .*float64", launched, "rms_norm", torch.ones(2, 64).double(), None, "late")


def test_refuses_a_scalar():
    refused("x: .*scalar", launched, "rms_norm", torch.tensor(1.0), None, "late")


def test_refuses_an_empty_row():
    refused("rows of 1 to", launched, "rms_norm", torch.ones(2, 0), None, "late")


def test_refuses_a_row_too_wide():
    refused("rows of 1 to", launched, "rms_norm", torch.ones(1, 32769), None, "late")
    refused("at most 32768", quantize.launch_quantize, torch.ones(1, 32769), 0)


def test_refuses_an_unknown_convention():
    refused("found mistral", launched, "rms_norm", torch.ones(2, 64), torch.ones(64), "mistral")


def test_refuses_a_weight_of_another_width():
    refused(r"weight: .*\[32\]", launched, "rms_norm", torch.ones(2, 64), torch.ones(32), "late")


def test_refuses_a_weight_wider_than_a_llama_norm():
    x, w = torch.ones(2, 64).half(), torch.ones(64)
    refused("weight: expected torch.float16", launched, "rms_norm", x, w, "llama")


def test_refuses_another_device():
    x = torch.ones(2, 64)
    refused("weight: .*meta", launched, "rms_norm", x, torch.ones(64, device="meta"), "late")
    other = torch.ones(2, 64, device="meta")
    refused("residual: .*meta", launched, "add_rms_norm", x, other, torch.ones(64), "late")


def test_refuses_a_residual_of_another_shape_or_dtype():
    x, w = torch.ones(2, 64), torch.ones(64)
    refused(r"residual: .*\[2, 64\]", launched, "add_rms_norm", x, torch.ones(3, 64), w, "late")
    refused("residual: .*float16", launched, "add_rms_norm", x, x.half(), w, "late")


def test_refuses_a_gate_of_another_shape():
    x, w = torch.ones(2, 64), torch.ones(64)
    refused(r"gate: .*\[2, 64\]", launched, "gated_rms_norm", x, torch.ones(2, 32), w)


def test_refuses_to_write_a_residual_that_has_no_rows():
    x, w = torch.ones(2, 64), torch.ones(64)
    refused("cannot be written", launched, "add_rms_norm_", x, torch.ones(64, 2).t(), w, "late")


def test_refuses_groups_that_nobody_reads():
    refused("group: .*found 64", quantize.launch_quantize, torch.ones(2, 128), 64)
    refused("multiple of 32", quantize.launch_quantize, torch.ones(2, 100), None)


# Through the registered operations


CALLS = {
    "rms_norm": lambda x, r, w: (x, w, EPS, "llama"),
    "rms_norm_fp8": lambda x, r, w: (x, w, EPS, "late", 128),
    "rms_norm_q8_1": lambda x, r, w: (x, None, EPS, "late"),
    "add_rms_norm": lambda x, r, w: (x, r, w, EPS, "gemma"),
    "add_rms_norm_": lambda x, r, w: (x, r, w, EPS, "gemma"),
    "add_rms_norm_fp8": lambda x, r, w: (x, r, w, EPS, "llama", 0),
    "add_rms_norm_q8_1": lambda x, r, w: (x, r, w, EPS, "llama"),
    "gated_rms_norm": lambda x, r, w: (x, r, w, EPS),
    "gated_rms_norm_fp8": lambda x, r, w: (x, r, w, EPS, 128),
    "gated_rms_norm_q8_1": lambda x, r, w: (x, r, w, EPS),
    "quantize_fp8": lambda x, r, w: (x, 128),
    "quantize_q8_1": lambda x, r, w: (x,),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    args = CALLS[name](*data(2, 3, width=160))
    torch.library.opcheck(getattr(op, name).default, args)


@pytest.mark.parametrize("name", CALLS)
def test_results_are_contiguous_whatever_x_is(name):
    x, residual, w = data(3, 2, width=160)
    args = CALLS[name](x.transpose(0, 1), residual.transpose(0, 1), w)
    found = getattr(op, name)(*args)
    assert all(t.is_contiguous() for t in ([found] if isinstance(found, torch.Tensor) else found))


class Calls(torch.nn.Module):
    def forward(self, x, residual, w):
        results = []
        for name, args in CALLS.items():
            found = getattr(op, name)(*args(x, residual.clone(), w))
            results += [found] if isinstance(found, torch.Tensor) else found
        return results


@pytest.mark.parametrize("how", ["compile", "export"])
def test_compile_and_export(how):
    given = data(4, width=256)
    expected = Calls()(*given)
    if how == "compile":
        module = torch.compile(Calls(), fullgraph=True, backend="aot_eager")
    else:
        module = torch.export.export(Calls(), tuple(given)).module()
    assert same(module(*given), expected)


# As Hopper code


@pytest.fixture(scope="module")
def hopper():
    return sass.reports("sass_norm")


def test_nothing_spills(hopper):
    assert {name: r.spills for name, (r,) in hopper.items() if r.spills} == {}


@pytest.mark.parametrize("name, loads", [
    ("add 1 4096", 3),  # x, residual and weight, once each
    ("add 1 16384", 12),
    ("add 2048 4096", 12),
    ("add 2048 5120", 9),
    ("add q8_1 1", 3),
    ("quantize fp8", 2),
    ("quantize q8_1", 1),
])  # fmt: skip
def test_every_load_is_16_bytes(hopper, name, loads):
    assert hopper[name][0].loads == {"128": loads}
