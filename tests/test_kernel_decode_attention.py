"""decode_attention under Triton's interpreter, against float64; what the compiler makes of it;
refusals."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import sass  # noqa: E402
from fuseweights.kernels import decode_attention as module  # noqa: E402
from fuseweights.kernels.decode_attention import decode_attention, reference  # noqa: E402
from fuseweights.kernels.launch import KernelError  # noqa: E402
from gpu_decode_attention import MODELS, Block, block_inputs, given, problems  # noqa: E402

from fuseweights.nn import ops  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # the interpreter's log2(0), of a part of which a query sees nothing
        warnings.filterwarnings("ignore", "divide by zero")
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lengths", [[1], [150, 70]], ids=str)
def test_models(model, lengths):
    # the interpreter rounds to bfloat16 by truncation, so float16 stands for it
    assert problems(model, lengths, 160, 1, torch.float16, "cpu") == []


@pytest.mark.parametrize("model", ["phi3", "gemma"])
def test_float32_and_strides(model):
    assert problems(model, [130, 64], 140, 1, torch.float32, "cpu", strided=True) == []


@pytest.mark.parametrize("tokens", [2, 15, 16])
def test_several_tokens(tokens):
    assert problems("phi3", [140], 160, tokens, torch.float16, "cpu") == []
    assert problems("gemma", [tokens], 160, tokens, torch.float16, "cpu", strided=True) == []


@pytest.mark.parametrize("length", [2, 15, 63, 64, 65])
def test_lengths(length):
    assert problems("gemma", [length], 160, 1, torch.float16, "cpu") == []


@pytest.mark.slow
def test_long():
    assert problems("gpt-oss", [1000], 4096, 1, torch.float16, "cpu") == []
    assert problems("phi3", [4096], 4096, 3, torch.float16, "cpu") == []


def test_many_parts(monkeypatch):
    """More parts than the combining step adds at once."""
    monkeypatch.setattr(module, "COMBINED", 16)
    assert problems("gpt-oss", [700], 700, 1, torch.float16, "cpu") == []


def test_no_sequences():
    out = decode_attention(
        torch.empty(0, 4, 1, 64), *torch.empty(2, 0, 2, 9, 64), torch.tensor(3), 1.0
    )
    assert out.shape == (0, 1, 4, 64)


def test_a_query_that_sees_nothing_is_zero():
    arguments, options = given("gemma", [0, 1], 64, 2, torch.float16, "cpu")
    for run in (decode_attention, reference):
        out = run(*arguments, **options)
        assert not out[0].any() and not out[1, 0].any() and out[1, 1].all()


def test_one_length_for_all_sequences():
    (q, keys, values, _, scale), _ = given("gemma", [40, 40], 64, 1, torch.float16, "cpu")
    outs = [
        decode_attention(q, keys, values, torch.tensor(length), scale)
        for length in (40, [40], [40, 40])
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_reference_is_what_the_modules_compute():
    """The reference over a whole cache is ops.eager_attention, to the bit."""
    (q, keys, values, length, scale), _ = given("gpt-oss", [50], 50, 3, torch.bfloat16, "cpu")
    sinks = torch.randn(16, dtype=torch.bfloat16)
    mask = ops.causal_mask(q, keys, 20)
    expected, _ = ops.eager_attention(
        torch.nn.Module(), q, keys, values, mask, scale, softcap=15.0, s_aux=sinks
    )
    out = reference(q, keys, values, length, scale, 20, 15.0, sinks)
    assert torch.equal(out, expected)


# Refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.empty(1, 5, 64)}, r"q: expected \[B, H, T, d\], found \[1, 5, 64\]"),
        ({"q": torch.empty(1, 5, 1, 64).double()}, "q: expected bfloat16, .*float64"),
        ({"q": torch.empty(1, 5, 17, 64)}, "q: expected at most 16 tokens, found 17"),
        ({"q": torch.empty(1, 5, 1, 512)}, "q: expected heads of at most 256, found 512"),
        ({"q": torch.empty(1, 5, 1, 128)[..., ::2]}, "q: expected rows without gaps"),
        ({"key_cache": torch.empty(1, 3, 9, 64)}, "key_cache: expected .*a divisor of 5.*found"),
        ({"value_cache": torch.empty(1, 1, 8, 64)}, r"value_cache: .*found \[1, 1, 8, 64\]"),
        ({"key_cache": torch.empty(1, 1, 9, 64).half()}, "key_cache: expected torch.float32"),
        ({"length": torch.tensor(3, dtype=torch.int32)}, "length: expected int64, .*int32"),
        ({"length": torch.tensor([3, 3])}, r"length: expected int64, one or \[1\], .*\[2\]"),
        ({"sinks": torch.empty(4)}, r"sinks: expected \[5\], found \[4\]"),
        ({"gate": torch.empty(1, 5, 1, 64)}, r"gate: .*\[1, 1, 5, 64\], found \[1, 5, 1, 64\]"),
        ({"length": torch.empty((), dtype=torch.int64, device="meta")}, "length: expected on cpu"),
        ({"gate": torch.empty(1, 1, 5, 64, device="meta")}, "gate: expected on cpu, found on meta"),
    ],
)  # fmt: skip
def test_refuses(changes, message):
    arguments = {
        "q": torch.empty(1, 5, 1, 64),
        "key_cache": torch.empty(1, 1, 9, 64),
        "value_cache": torch.empty(1, 1, 9, 64),
        "length": torch.tensor(3),
        "scale": 1.0,
    }
    with pytest.raises(KernelError, match=message):
        decode_attention(**{**arguments, **changes})


# The registered operation


def test_opcheck():
    operation = torch.ops.fuseweights.decode_attention.default
    options = (0.125, 100, 20.0, torch.randn(4), torch.randn(2, 1, 4, 64))
    torch.library.opcheck(operation, (*block_inputs("cpu"), *options))


def test_compile_and_export():
    inputs = block_inputs("cpu")
    expected = reference(*inputs, 0.125) + 1
    assert torch.equal(Block()(*inputs), expected)
    for run in (
        torch.compile(Block(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Block(), tuple(inputs)).module(),
    ):
        assert torch.equal(run(*inputs), expected)


# What the compiler makes of it


def test_compiled_for_hopper():
    for name, (part, combine) in sass.reports("sass_decode_attention").items():
        assert part.spills == combine.spills == 0, name
        # K and V go to shared memory 16 bytes a thread, ahead of the products on the tensor cores
        copies = {o for o in part.opcodes if o.startswith("LDGSTS")}
        assert copies and all(".128" in o for o in copies), (name, copies)
        assert any(o.startswith(("HMMA", "HGMMA")) for o in part.opcodes), name
        assert combine.loads["128"] > 0, (name, combine.loads)
