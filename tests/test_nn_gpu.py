"""Kernels in an operation's place: called as the reference is, and computing what it computes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import gguf  # noqa: E402
from nn_models import build, distance, swap  # noqa: E402

from fuseweights.nn import FusedLinear, gpu, ops  # noqa: E402
from fuseweights.nn.blocks import MixedLinear  # noqa: E402
from fuseweights.nn.weights import GGUFBlocks, Plain, Scaled  # noqa: E402


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weight(n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": rand(n, k) * k**-0.5}


def blocks(*shape: int) -> torch.Tensor:
    """Random Q8_0 blocks."""
    packed = gguf.quants.quantize(rand(*shape).numpy(), gguf.GGMLQuantizationType.Q8_0)
    return torch.from_numpy(packed)


INDEX = torch.tensor([[0, 2], [3, 1], [1, 0]])
SCORES = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
DELTA = (rand(1, 9, 2, 8), rand(1, 9, 2, 8), rand(1, 9, 4, 8), -rand(1, 9, 4).abs())
FP8 = {
    "weight": rand(256, 128).to(torch.float8_e4m3fn),
    "weight_scale_inv": rand(2, 1).abs() + 0.1,
}
Q8_0 = {"weight": blocks(12, 64)}
STACKS = {"gate_up": blocks(4, 64, 64), "down": blocks(4, 64, 32)}
FORMATS = {name: GGUFBlocks(8) for name in STACKS}
BLOCK = Scaled(128, 128, "weight_scale_inv")
CASES = [
    ("linear", 0, (rand(3, 8), weight(6, 8), Plain(), rand(6))),
    ("linear", 1, (rand(3, 128), FP8, BLOCK, rand(256))),
    ("gated_linear", 0, (rand(3, 8), weight(6, 8), Plain(), None, "gelu_tanh")),
    ("gated_linear", 1, (rand(3, 128), FP8, BLOCK, None, "silu")),
    ("linear", 2, (rand(3, 64), Q8_0, GGUFBlocks(8), rand(12))),
    ("gated_linear", 2, (rand(3, 64), Q8_0, GGUFBlocks(8), None, "gelu_tanh")),
    ("block_experts", 0, (rand(3, 64), INDEX, SCORES, STACKS, FORMATS, "silu")),
    ("gated", 0, (rand(2, 3, 8), "silu")),
    ("experts", 0, (rand(3, 8), INDEX, SCORES, rand(4, 12, 8), rand(4, 8, 6), "silu")),
    ("rms_norm", 0, (rand(2, 3, 8), rand(8), 1e-6, "gemma")),
    ("rms_norm", 0, (rand(2, 3, 8), None, 1e-6)),
    ("add_rms_norm", 0, (rand(2, 3, 8), rand(2, 3, 8) + 1, rand(8), 1e-6, "late")),
    ("gated_rms_norm", 0, (rand(3, 4, 8), rand(3, 4, 8) + 1, rand(8), 1e-6)),
    ("causal_conv", 0, (rand(2, 12, 8), rand(8, 4))),
    ("delta_chunks", 0, (*DELTA, rand(1, 9, 4).sigmoid(), rand(1, 4, 8, 8), True)),
]
NAMED = [f"{name}-{at}" for name, at, _ in CASES]


def test_every_kernel_has_a_case():
    found = {(call.__name__, call.kernels.index(tuple(pair))) for call, *pair in gpu.KERNELS}
    assert found == {(name, at) for name, at, _ in CASES}


@pytest.mark.parametrize(("name", "at", "given"), CASES, ids=NAMED)
def test_computes_what_the_reference_computes(name, at, given):
    """Through the registered operation, whose CPU form the kernels are compared with."""
    call = getattr(ops, name)
    accepts, run = call.kernels[at]
    assert not accepts(*given)  # a CPU keeps the reference
    mine, wanted = run(*given), call.reference(*given)
    pairs = zip(mine, wanted, strict=True) if isinstance(mine, tuple) else [(mine, wanted)]
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype and distance(a, b) <= 1e-6


def test_gate_and_up_of_two_types():
    up = weight(6, 64)["weight"]
    stacks = [
        FusedLinear.from_tensors({"gate": 12}, Q8_0, GGUFBlocks(8)),
        FusedLinear.from_tensors({"up": 12}, {"weight": torch.cat((up, up))}),
    ]
    x = rand(3, 64)
    gate, up = stacks[0](x), stacks[1](x)
    mixed = MixedLinear(stacks)
    assert distance(mixed.gated(x, "silu"), torch.nn.functional.silu(gate) * up) <= 1e-6


class OnGPU(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_what_is_taken(monkeypatch):
    x = rand(3, 8).as_subclass(OnGPU)
    assert not gpu.takes(x)  # more than a plain tensor
    monkeypatch.setattr(gpu, "Tensor", OnGPU)
    assert gpu.takes(x) and gpu.takes(x, None, rand(2).as_subclass(OnGPU))
    assert not gpu.takes(x.double())
    assert not gpu.takes(x, rand(8).as_subclass(OnGPU).requires_grad_())
    with torch.no_grad():
        assert gpu.takes(x, rand(8).as_subclass(OnGPU).requires_grad_())
        held = {"weight": rand(6, 8).as_subclass(OnGPU)}
        accepts, _ = ops.linear.kernels[0]
        assert accepts(x, held, Plain(), None)
        assert not accepts(x, held, Scaled(), None)
        fp8 = {name: tensor.as_subclass(OnGPU) for name, tensor in FP8.items()}
        for format, taken in (
            (BLOCK, True),
            (Scaled(64, 64, "weight_scale_inv"), False),
            (Scaled(128, 128, "weight_scale_inv", zero_point="weight"), False),
        ):
            assert ops.linear.kernels[1][0](x.bfloat16(), fp8, format, None) is taken
        assert not ops.linear.kernels[1][0](x, fp8, BLOCK, None)
        assert not accepts(x, {"weight": held["weight"].half()}, Plain(), None)


@pytest.mark.parametrize(
    "family",
    [
        *("llama_bias", "qwen3", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "gemma3_text"),
        *("gemma4_text", "gemma4_k_eq_v", "olmo2", "glm4", "cohere2", "gpt_oss"),
    ],
)
def test_modules_through_the_registered_operations(family, monkeypatch):
    """A whole model with every operation that a GPU would be asked for, on the CPU."""
    model, _ = swap(build(family, torch.float32))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        asked = []
        monkeypatch.setattr(gpu, "takes", lambda *given: not asked.append(given))
        assert distance(model(ids).logits, wanted) <= 1e-5
    assert len(asked) > 4 * model.config.num_hidden_layers
