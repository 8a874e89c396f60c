"""FusedLinear and its storage: sections, formats, LoRA, un-fusing, tensor parallel shares."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from nn_models import distance  # noqa: E402
from torch import nn  # noqa: E402

from fuseweights.errors import UsageError  # noqa: E402
from fuseweights.nn import FusedLinear, GGUFBlocks, Plain, Scaled, Section  # noqa: E402
from fuseweights.nn.weights import detect  # noqa: E402

E4M3 = torch.float8_e4m3fn


def layers(rows: dict[str, int], k: int = 48, bias: bool = False, dtype=torch.float32):
    torch.manual_seed(0)
    return {name: nn.Linear(k, n, bias=bias).to(dtype) for name, n in rows.items()}


QKV = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stack_split_and_unfuse(dtype, bias):
    parts = layers(QKV, bias=bias, dtype=dtype)
    fused = FusedLinear.from_parts(parts)
    assert list(fused.state_dict()) == ["weight", "bias"][: 1 + bias]
    x = torch.randn(3, 5, 48, dtype=dtype)
    y = fused(x)
    for part, view in zip(parts.values(), fused.split(y), strict=True):
        assert view.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        torch.testing.assert_close(view, part(x))
    for name, tensors in fused.parts().items():
        assert tensors.keys() == dict(parts[name].named_parameters()).keys()
        assert all(torch.equal(t, getattr(parts[name], n)) for n, t in tensors.items())
        assert tensors["weight"].data_ptr() == fused.weight[fused.slices[name]].data_ptr()


WIDE_ENOUGH = [
    (64, {"q_proj": 64, "k_proj": 32, "v_proj": 32}),
    (128, {"gate_proj": 96, "up_proj": 96}),
    (2048, {"q_proj": 2048, "k_proj": 512, "v_proj": 512}),
    (2048, {"gate_proj": 1536, "up_proj": 1536}),
    (100, {"gate_proj": 4, "up_proj": 12}),
    (896, {"q_proj": 896, "k_proj": 128, "v_proj": 128}),
]


@pytest.mark.parametrize("k, rows", WIDE_ENOUGH)
def test_one_token_is_bit_equal_to_the_parts(k, rows):
    """float32 on the CPU, M = 1, parts of a multiple of four rows: every output is the same sum."""
    parts = layers(rows, k)
    x = torch.randn(1, k)
    y = FusedLinear.from_parts(parts)(x)
    assert torch.equal(y, torch.cat([part(x) for part in parts.values()], -1))


@pytest.mark.parametrize("k, rows", [(100, (33, 7, 5)), (256, (10, 4, 1)), (2048, (2047, 1))])
def test_one_token_with_ragged_parts_differs_in_the_last_bits(k, rows):
    """MKL's gemv takes four rows at a time and sums the N mod 4 rows left over in another order
    (measured: exact for every N1 % 4 == 0, and never else). Stacking makes other rows the left-over
    ones, so some sums differ in their last bits: 3e-8 to 8e-8 of the norm."""
    parts = layers({f"p{i}": n for i, n in enumerate(rows)}, k)
    x = torch.randn(1, k)
    y = FusedLinear.from_parts(parts)(x)
    assert distance(y, torch.cat([part(x) for part in parts.values()], -1)) < 1e-6


def fp8_block(n: int, k: int, scale_dtype=torch.float32, block: int = 128):
    grid = (-(-n // block), -(-k // block))
    scale = torch.rand(grid).add(0.1) if scale_dtype == torch.float32 else torch.ones(grid)
    return {"weight": torch.randn(n, k).to(E4M3), "weight_scale_inv": scale.to(scale_dtype)}


def by_hand(part: dict) -> torch.Tensor:
    weight, scale = part["weight"].float(), part["weight_scale_inv"].float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    return weight


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("rows", [(256, 128, 72), (192, 64, 64)])
def test_fp8_blocks(rows, scale_dtype):
    """Whole blocks keep their scales; parts that end inside a block get a scale a row."""
    torch.manual_seed(0)
    parts = {name: fp8_block(n, 200, scale_dtype) for name, n in zip(QKV, rows, strict=True)}
    fused = FusedLinear.from_parts(parts)
    whole = rows == (256, 128, 72)
    assert fused.format == Scaled(128 if whole else 1, 128, "weight_scale_inv")
    assert list(fused.state_dict()) == ["weight", "weight_scale_inv"]
    weight = torch.cat([by_hand(part) for part in parts.values()])
    assert torch.equal(fused.format.dequantize(fused.tensors(), torch.float32), weight)
    x = torch.randn(2, 200)
    assert torch.equal(fused(x), nn.functional.linear(x, weight))
    if whole:
        for name, tensors in fused.parts().items():
            assert all(torch.equal(t.float(), parts[name][n].float()) for n, t in tensors.items())


def test_transformers_own_fp8_layers():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    parts = {}
    for name, rows in (("gate_proj", 256), ("up_proj", 200)):
        parts[name] = finegrained.FP8Linear(300, rows, block_size=(128, 128))
        for key, value in fp8_block(rows, 300).items():
            setattr(parts[name], key, nn.Parameter(value, requires_grad=False))
    fused = FusedLinear.from_parts(parts)
    assert fused.format == Scaled(128, 128, "weight_scale_inv") and fused.bias is None
    want = torch.cat([by_hand(dict(part.named_parameters())) for part in parts.values()])
    x = torch.randn(2, 300)
    assert torch.equal(fused(x), nn.functional.linear(x, want))


@pytest.mark.parametrize("equal", [True, False])
def test_fp8_by_layer(equal):
    """One scale stays one if the parts agree to the bit, else every row gets its part's."""
    scales = (0.5, 0.5 if equal else 0.25)
    parts = {
        name: {"weight": torch.randn(32, 16).to(E4M3), "weight_scale": torch.tensor([scale])}
        for name, scale in zip(("gate_proj", "up_proj"), scales, strict=True)
    }
    fused = FusedLinear.from_parts(parts)
    assert fused.weight_scale.shape == ((1,) if equal else (64, 1))
    want = torch.cat([p["weight"].float() * p["weight_scale"] for p in parts.values()])
    assert torch.equal(fused.format.dequantize(fused.tensors(), torch.float32), want)


@pytest.mark.parametrize("kind", [torch.int8, E4M3])
@pytest.mark.parametrize("zero_point", [False, True])
def test_by_channel(kind, zero_point):
    parts = {}
    for name in QKV:
        weight = torch.randint(-100, 100, (QKV[name], 24)).to(kind)
        parts[name] = {"weight": weight, "weight_scale": torch.rand(QKV[name], 1)}
        if zero_point:
            parts[name]["weight_zero_point"] = torch.randint(-9, 9, (QKV[name], 1)).to(torch.int8)
    fused = FusedLinear.from_parts(parts)
    want = torch.cat(
        [
            (p["weight"].float() - p.get("weight_zero_point", torch.zeros(1))) * p["weight_scale"]
            for p in parts.values()
        ]
    )
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(fused(x), nn.functional.linear(x, want.bfloat16()))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_gguf_blocks(kind):
    """Raw ggml blocks stack by rows and dequantize as gguf does, under torch.compile too."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[kind]
    weights, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    parts = {}
    for name, rows in QKV.items():
        raw = rng.integers(0, 256, (rows, 256 // weights * size), dtype=np.uint8)
        # block scales that are numbers: float16 bytes, high one small
        values = raw.reshape(rows, -1, size)
        at = {"Q6_K": (209,), "Q4_K": (1, 3)}.get(kind.name, (1,))
        values[..., list(at)] = 0x2C
        parts[name] = {"weight": torch.from_numpy(raw)}
    fused = FusedLinear.from_parts(parts, format=GGUFBlocks(int(kind)))
    want = torch.cat(
        [torch.from_numpy(dequantize(p["weight"].numpy(), kind)) for p in parts.values()]
    )
    x = torch.randn(1, 256)
    assert torch.equal(fused(x), nn.functional.linear(x, want))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fused(x))
    assert fused.in_features == 256
    shards = [fused.shard(rank, 2)(x) for rank in range(2)]
    assert torch.equal(shards[1][:, :32], fused(x)[:, 32:64])


def test_every_disagreement_in_one_error():
    parts = layers(QKV, bias=True)
    parts["k_proj"] = nn.Linear(40, 32, bias=False)
    parts["v_proj"] = parts["v_proj"].half()
    with pytest.raises(UsageError) as error:
        FusedLinear.from_parts(parts)
    text = str(error.value)
    assert "input size: q_proj has 48, k_proj has 40, v_proj has 48" in text
    assert "tensors: q_proj has bias + weight, k_proj has weight" in text
    assert "dtype of weight: q_proj has float32, k_proj has float32, v_proj has float16" in text
    assert "dtype of bias: q_proj has float32, v_proj has float16" in text


def test_unequal_static_input_scales_are_refused():
    parts = {
        name: {
            "weight": torch.randn(32, 16).to(E4M3),
            "weight_scale": torch.tensor([0.5]),
            "input_scale": torch.tensor([scale]),
        }
        for name, scale in (("gate_proj", 0.5), ("up_proj", 0.25))
    }
    with pytest.raises(UsageError, match=r"input_scale: gate_proj has 0\.5, up_proj has 0\.25"):
        FusedLinear.from_parts(parts)
    parts["up_proj"]["input_scale"] = parts["gate_proj"]["input_scale"].clone()
    assert FusedLinear.from_parts(parts).input_scale.item() == 0.5


def test_unknown_storage_is_refused():
    with pytest.raises(UsageError, match=r"no format .* qzeros"):
        detect({"weight": torch.zeros(2, 2, dtype=torch.int8), "qzeros": torch.zeros(1)})
    with pytest.raises(UsageError, match="not a linear layer"):
        FusedLinear.from_parts({"q_proj": nn.Sequential(nn.Linear(2, 2))})


def test_lora_of_some_parts():
    """Adapters of q and v alone, one block-diagonal pair for the fused layer: the same function."""
    parts = layers(QKV)
    fused = FusedLinear.from_parts(parts)
    adapters = {
        "q_proj": (torch.randn(4, 48), torch.randn(64, 4)),
        "v_proj": (torch.randn(2, 48), torch.randn(32, 2)),
    }
    a, b = fused.fuse_lora(adapters)
    x = torch.randn(3, 48)
    q, k, v = fused.split(x @ a.T @ b.T)
    torch.testing.assert_close(q, x @ adapters["q_proj"][0].T @ adapters["q_proj"][1].T)
    assert not k.any()
    torch.testing.assert_close(v, x @ adapters["v_proj"][0].T @ adapters["v_proj"][1].T)
    with pytest.raises(UsageError, match="o_proj"):
        fused.fuse_lora({"o_proj": adapters["q_proj"]})


def test_shares_of_sections():
    """Heads stay whole, key heads are repeated where there are more processes than heads."""
    sections = {"q": Section(64, 8), "k": Section(16, 2, True), "v": Section(16, 2, True)}
    fused = FusedLinear(24, sections, bias=True)
    nn.init.normal_(fused.bias)
    x = torch.randn(3, 24)
    q, k, _ = fused.split(fused(x))
    for world in (1, 2, 4):
        shards = [fused.shard(rank, world) for rank in range(world)]
        got = [shard.split(shard(x)) for shard in shards]
        torch.testing.assert_close(torch.cat([g[0] for g in got], -1), q)
        per = max(1, world // 2)
        torch.testing.assert_close(torch.cat([g[1] for g in got[::per]], -1), k)
        assert shards[0].rows == [64 // world, 16 // min(world, 2), 16 // min(world, 2)]
    for world in (3, 16):
        with pytest.raises(UsageError, match=f"8 heads do not divide among {world} processes"):
            fused.shard(0, world)


def test_shares_of_fp8_blocks():
    """A share that ends inside a block keeps its values with a scale a row."""
    torch.manual_seed(0)
    parts = {"gate_proj": fp8_block(256, 128), "up_proj": fp8_block(256, 128)}
    fused = FusedLinear.from_parts(parts)
    x = torch.randn(1, 128)
    gate, up = fused.split(fused(x))
    for world, rows in ((2, 128), (4, 1)):
        for rank in range(world):
            shard, n = fused.shard(rank, world), 256 // world
            assert shard.format.rows == rows
            mine = torch.cat([t[:, n * rank : n * (rank + 1)] for t in (gate, up)], -1)
            torch.testing.assert_close(shard(x), mine)


def test_a_copy_is_a_module_like_any_other():
    fused = FusedLinear.from_parts(layers(QKV, bias=True))
    twin = copy.deepcopy(fused).double()
    assert twin.weight.dtype == torch.float64 and twin.sections == fused.sections
    assert "q_proj=64, k_proj=32, v_proj=32" in repr(fused)
    assert fused.format == Plain() and fused.weight.requires_grad
    frozen = layers(QKV)
    for part in frozen.values():
        part.requires_grad_(False)
    assert not FusedLinear.from_parts(frozen).weight.requires_grad
