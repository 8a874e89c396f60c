"""The numpy reference against the libraries, and through it fused checkpoints against their parts.

Every fixture is compared with `hf_formats.dequantize`, which test_hf_fixtures.py holds to the
libraries themselves, bit for bit. One differs from it: bitsandbytes' INT8, where the fixture's
weight · (SCB / 127) rounds otherwise than the library's weight · SCB · (1 / 127). Ours is the
library's, and compared with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuseweights import convert, dequantize
from fuseweights.api import open_checkpoint
from fuseweights.checkpoint.model import Checkpoint
from fuseweights.dequantize import bits, unpack, weights
from fuseweights.rules import formats

torch = pytest.importorskip("torch", reason="compares with torch and the libraries on it")
pytest.importorskip("transformers", reason="the fixtures' configurations are its own")

import hf_formats  # noqa: E402

REFUSED = [name for name, row in hf_formats.FORMATS.items() if row.refused]
READ = [name for name in hf_formats.FORMATS if name not in REFUSED]
FUSED = [name for name in READ if name != "bnb_nf4_nested"]
K = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def need(fmt: str) -> None:
    if library := hf_formats.FORMATS[fmt].library:
        pytest.importorskip(library.replace("-", "_"))


def stored(checkpoint: Checkpoint, module: str) -> dict[str, dequantize.Raw]:
    """The tensors of a module by suffix, as our own reader finds them."""
    return {
        name.removeprefix(f"{module}."): (t.dtype, t.shape, checkpoint.read(t, limit=t.size))
        for name, t in checkpoint.tensors.items()
        if name.startswith(f"{module}.")
    }


def read(checkpoint: Checkpoint, module: str, rows: tuple[int, int] | None = None) -> np.ndarray:
    return weights(checkpoint.quantization, stored(checkpoint, module), rows)


def raw(dtype: str, array: Any) -> dequantize.Raw:
    array = np.ascontiguousarray(array)
    return dtype, array.shape, array.tobytes()


def raw_torch(dtype: str, tensor: torch.Tensor) -> dequantize.Raw:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return dtype, tuple(tensor.shape), data


def same(one: np.ndarray, other: Any) -> bool:
    other = np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(bits(one), bits(other))


def linears(model: str, layers: int) -> list[str]:
    names = hf_formats.MODELS[model].linears(hf_formats.Sizes())
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in names]


@cache
def codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8)


# --- tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, name",
    [
        (dequantize.E4M3, "float8_e4m3fn"),
        (dequantize.E5M2, "float8_e5m2"),
        (dequantize.E8M0, "float8_e8m0fnu"),
    ],
)
def test_tables_equal_torch(table: np.ndarray, name: str) -> None:
    """NaN for NaN; their payloads are torch's own affair and products do not keep them."""
    theirs = codes().view(getattr(torch, name)).float().numpy()
    number = ~np.isnan(theirs)
    assert table.shape == (256,) and np.isnan(table[~number]).all()
    assert same(table[number], theirs[number])


def test_fp4_table() -> None:
    """torch has no cast from its FP4, so this is transformers' table of it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    assert same(dequantize.E2M1, np.array(Fp8Dequantize._FP4_E2M1_LUT, np.float32))
    unpacked = Fp8Dequantize(None)._unpack_fp4(codes()[None])
    assert same(dequantize.E2M1[unpack(codes().numpy()[None], 4, 512)], unpacked.numpy())


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 64, 77])
def test_unpack_equals_compressed_tensors(width: int, count: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = np.random.default_rng(count).integers(0, 1 << width, (5, count))
    signed = torch.from_numpy(values - (1 << width - 1)).to(torch.int8)
    words = helpers.pack_to_int32(signed, width).numpy()
    assert np.array_equal(unpack(words, width, count), values)


# --- every format against its reference --------------------------------------------------------


def reference(fmt: str, tensors: dict[str, torch.Tensor], module: str) -> np.ndarray:
    if fmt == "bnb_int8":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(tensors[f"{module}.weight"], tensors[f"{module}.SCB"])
    return hf_formats.dequantize(fmt, tensors, module).contiguous().numpy()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("fmt", READ)
def test_every_linear_layer_equals_the_reference(fmt: str, ragged: bool, tmp_path: Path) -> None:
    need(fmt)
    hf_formats.save(fmt, tmp_path, ragged=ragged, layers=1)
    tensors, checkpoint = hf_formats.load(tmp_path), open_checkpoint(tmp_path)
    for module in linears("llama", 1):
        values = read(checkpoint, module)
        assert values.flags.c_contiguous and same(values, reference(fmt, tensors, module)), module


@pytest.mark.parametrize("model", ["qwen3_5", "deepseek_v3"])
@pytest.mark.parametrize("fmt", ["fp8_block", "modelopt_nvfp4", "gptq_desc_act"])
def test_other_models(fmt: str, model: str, tmp_path: Path) -> None:
    hf_formats.save(fmt, tmp_path, model=model, layers=1)
    tensors, checkpoint = hf_formats.load(tmp_path), open_checkpoint(tmp_path)
    for module in linears(model, 1):
        assert same(read(checkpoint, module), reference(fmt, tensors, module)), module


@pytest.mark.parametrize("fmt", READ)
def test_rows_are_rows_of_the_whole(fmt: str, tmp_path: Path) -> None:
    """Also where they begin and end inside a block, a word, a byte."""
    need(fmt)
    checkpoint = open_checkpoint(hf_formats.save(fmt, tmp_path, layers=1))
    module = "model.layers.0.mlp.gate_proj"
    whole = read(checkpoint, module)
    for begin, end in [(0, 1), (3, 5), (127, 130), (13, 377), (383, 384), (7, 7)]:
        assert same(read(checkpoint, module, (begin, end)), whole[begin:end])


@pytest.mark.parametrize("fmt", REFUSED)
def test_unknown_layouts_are_refused(fmt: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf_formats.save(fmt, tmp_path, layers=1))
    with pytest.raises(ValueError, match="not known"):
        read(checkpoint, "model.layers.0.self_attn.v_proj")


def test_an_unquantized_layer_among_quantized_ones(tmp_path: Path) -> None:
    hf_formats.save("fp8_block", tmp_path, unquantized="v_proj", bias_on=("v_proj",), layers=1)
    module = "model.layers.0.self_attn.v_proj"
    theirs = hf_formats.load(tmp_path)[f"{module}.weight"]
    assert same(read(open_checkpoint(tmp_path), module), theirs.float().numpy())


# --- what no fixture has -----------------------------------------------------------------------


def test_every_method_that_may_fuse_can_be_read() -> None:
    assert dequantize.FORMATS.keys() == formats.FORMATS.keys()


def test_plain_numbers_keep_every_bit() -> None:
    half = np.arange(65536, dtype=np.uint16)
    read16 = weights({}, {"weight": raw("F16", half.reshape(256, 256))})
    nan = np.isnan(read16)
    assert same(read16[~nan], half.view(np.float16).astype(np.float32).reshape(256, 256)[~nan])
    assert nan.sum() == 2 * 1023
    brain = weights({}, {"weight": raw("BF16", half.reshape(256, 256))})
    assert np.array_equal(bits(brain).ravel(), half.astype(np.uint32) << 16)
    for kind, name in [(np.float32, "F32"), (np.float64, "F64")]:
        random = np.random.default_rng(0).integers(0, 256, (9, 8 * np.dtype(kind).itemsize))
        odd = random.astype(np.uint8).view(kind)
        odd[0, :3] = np.nan, -np.inf, -0.0
        values = weights({}, {"weight": raw(name, odd)}, (0, 5))
        assert values.dtype == kind and same(values, odd[:5])


def test_nans_of_products_are_alike_wherever_they_stand() -> None:
    """numpy's vector loops and their tails keep the one or the other of two NaNs."""
    weight, scale = raw("F8_E4M3", np.full((37, 37), 0xFF, np.uint8)), np.float32([np.nan])
    scale.view(np.uint32)[0] |= 5
    layer = {"weight": weight, "weight_scale": raw("F32", scale)}
    whole = weights({"quant_method": "compressed-tensors"}, layer)
    assert np.unique(bits(whole)).tolist() == [0x7FC00000]


def test_e5m2_with_a_scale() -> None:
    weight = codes()[:124].reshape(4, 31)
    scale = torch.tensor([[0.3], [0.7], [1.1], [1.3]])
    layer = {"weight": raw_torch("F8_E5M2", weight), "weight_scale": raw_torch("F32", scale)}
    theirs = weight.view(torch.float8_e5m2).float() * scale
    assert same(weights({"quant_method": "modelopt"}, layer), theirs.numpy())


def test_mxfp8_by_compressed_tensors() -> None:
    """Bytes as scales, a group of columns each."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    args = {**hf_formats._MXFP4, "num_bits": 8}
    scheme = hf_formats._ct_scheme(args, None)
    weight = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale = torch.arange(120, 132, dtype=torch.uint8).reshape(6, 2)
    state = {"weight": weight, "weight_scale": scale}
    theirs = compressors.BaseCompressor.get_value_from_registry("mxfp8-quantized").decompress(
        state, scheme
    )["weight"]
    layer = {"weight": raw_torch("F8_E4M3", weight), "weight_scale": raw_torch("U8", scale)}
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 32}}}}
    ours = weights({"quant_method": "compressed-tensors", **config}, layer)
    assert same(ours, theirs.float().numpy())  # their bfloat16 holds it: a power of two scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", range(1, 9))
def test_packed_integers_of_every_width(width: int, symmetric: bool) -> None:
    """Packed by compressed-tensors; the value is what its unpacked integers give."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    random = np.random.default_rng(width)
    half, rows, groups = 1 << width - 1, 40, 2
    value = random.integers(-half, half, (rows, K)).astype(np.int8)
    zero = random.integers(-half, half, (rows, groups)).astype(np.int8)
    scale = random.standard_normal((rows, groups)).astype(np.float32)
    layer = {
        "weight_packed": raw_torch("I32", helpers.pack_to_int32(torch.from_numpy(value), width)),
        "weight_scale": raw("F32", scale),
        "weight_shape": raw("I64", np.array([rows, K])),
    }
    if not symmetric:
        packed = helpers.pack_to_int32(torch.from_numpy(zero), width, packed_dim=0)
        layer["weight_zero_point"] = raw_torch("I32", packed)
    scheme = {"num_bits": width, "group_size": K // groups}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": scheme}},
    }
    steps = value - np.float32(np.repeat(zero, K // groups, 1) * (not symmetric))
    expected = steps * np.repeat(scale, K // groups, 1)
    assert same(weights(config, layer), expected)
    assert same(weights(config, layer, (11, 30)), expected[11:30])
    ungrouped = {**layer, "weight_g_idx": raw("I32", np.full(K, -1, np.int32))}
    assert same(weights(config, ungrouped), expected)
    g_idx = random.permutation(K) % groups
    by_index = {**layer, "weight_g_idx": raw("I32", g_idx.astype(np.int32))}
    steps = value - np.float32(zero[:, g_idx] * (not symmetric))
    assert same(weights(config, by_index), steps * scale[:, g_idx])


def words(values: np.ndarray, width: int) -> np.ndarray:
    """Each row as one long integer, low bits first, cut into 32-bit words."""
    whole = [sum(int(v) << i * width for i, v in enumerate(row)) for row in values]
    size = -(-values.shape[1] * width // 32) * 4
    return np.array([np.frombuffer(n.to_bytes(size, "little"), np.int32) for n in whole])


@pytest.mark.parametrize("layout, offset", [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gptq_of_every_width(width: int, layout: str, offset: int) -> None:
    random = np.random.default_rng(width)
    value = random.integers(0, 1 << width, (32, K))
    zero = random.integers(0, 1 << width, (2, 32))
    scale = random.standard_normal((2, 32)).astype(np.float16)
    g_idx = random.permutation(K) % 2
    layer = {
        "qweight": raw("I32", words(value, width).T),
        "qzeros": raw("I32", words(zero, width)),
        "scales": raw("F16", scale),
        "g_idx": raw("I32", g_idx.astype(np.int32)),
    }
    config = {"quant_method": "gptq", "bits": width, "checkpoint_format": layout}
    steps = (value - zero[g_idx].T - offset).astype(np.float32)
    assert same(weights(config, layer), steps * scale[g_idx].T.astype(np.float32))
    config["bits"] = 5  # a rule of `dynamic` may say otherwise for this layer: the shapes tell
    assert same(weights(config, layer), steps * scale[g_idx].T.astype(np.float32))


@pytest.mark.parametrize("columns", [64, 63])  # with 63, rows begin in the middle of a byte
def test_bitsandbytes_stored_in_another_type(columns: int) -> None:
    """`bnb_4bit_quant_storage` packs the same bytes into tensors of any type."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    tensors = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    theirs = hf_formats.unpack_bnb4({"weight": packed, **tensors}).numpy()
    names = {torch.uint8: "U8", torch.float32: "F32"}
    layer = {k: raw_torch(names[v.dtype], v) for k, v in tensors.items()}
    config = {"quant_method": "bitsandbytes"}
    for dtype, size in [("U8", 1), ("BF16", 2)]:
        data = packed.numpy().tobytes()
        layer["weight"] = dtype, (len(data) // size, 1), data
        assert same(weights(config, layer), theirs)
        assert same(weights(config, layer, (5, 9)), theirs[5:9])


def fp8(**changes: Any) -> dict[str, dequantize.Raw]:
    layer = {
        "weight": raw("F8_E4M3", np.zeros((256, 256), np.uint8)),
        "weight_scale_inv": raw("F32", np.ones((2, 2), np.float32)),
    }
    return {k: v for k, v in {**layer, **changes}.items() if v is not None}


WORD = {"qweight": raw("I32", np.int32([[1]]))}


@pytest.mark.parametrize(
    "config, layer, match",
    [
        ({}, fp8(), "method '' is not known"),
        ({"quant_method": "quip"}, fp8(), "method 'quip' is not known with tensors weight F8_E4M3"),
        ({"quant_method": "fp8"}, fp8(weight_scale_inv=None), "is not known"),
        ({"quant_method": "fp8"}, fp8(), "fit weights"),  # no block size is stated
        ({}, fp8(weight=raw("BF16", np.zeros((2, 2), np.uint16))), "is not known"),
        ({}, {"bias": raw("F32", np.zeros(2, np.float32))}, "no weight"),
        ({"quant_method": "fp8"}, fp8(weight=raw("U8", np.zeros((2, 2), np.uint8))), "weight U8"),
        ({"quant_method": "fp8"}, fp8(weight=("F4", (2, 2), b"12")), "dtype F4"),
        ({"quant_method": "fp8"}, fp8(weight=("F8_E4M3", (2, 2), b"123")), "reshape"),
        ({"quant_method": "fp8", "config_groups": 7}, fp8(), "contradict"),
        ({"quant_method": "awq", "version": "gemv"}, WORD, "gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, WORD, "marlin"),
        ({"quant_method": "gptq"}, WORD, "has no scales"),
    ],
)
def test_a_layer_that_cannot_be_read_says_why(config: dict, layer: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weights(config, layer)


def test_a_state_that_lies_allocates_nothing(tmp_path: Path) -> None:
    need("bnb_nf4")
    checkpoint = open_checkpoint(hf_formats.save("bnb_nf4", tmp_path, layers=1))
    layer = stored(checkpoint, "model.layers.0.self_attn.v_proj")
    name = "weight.quant_state.bitsandbytes__nf4"
    good = json.loads(layer[name][2])
    for lie in [{"shape": [1 << 40, 256]}, {"shape": "x"}, {"blocksize": None}, {"blocksize": -3}]:
        blob = json.dumps({**good, **lie}).encode()
        with pytest.raises(ValueError):
            weights(checkpoint.quantization, {**layer, name: ("U8", (len(blob),), blob)})


# --- fused against its parts -------------------------------------------------------------------


def assert_sections_equal(source: Path, fused: Path, layers: int, model: str = "llama") -> None:
    """Rows of every fused module are the parts' weights, where the fixture says they lie."""
    a, b = open_checkpoint(source), open_checkpoint(fused)
    for layer in range(layers):
        for module, parts in hf_formats.groups(layer, model).items():
            whole, begin = read(b, module), 0
            for part in parts:
                values = read(a, part)
                end = begin + len(values)
                assert same(whole[begin:end], values), part
                assert same(read(b, module, (begin, end)), values), part
                begin = end
            assert begin == len(whole)


@pytest.mark.parametrize("fmt", FUSED)
def test_sections_of_fused_modules_equal_their_parts(fmt: str, tmp_path: Path) -> None:
    need(fmt)
    source, fused = hf_formats.save(fmt, tmp_path / "a"), tmp_path / "b"
    plan = convert(source, fused, consumer="torch", sync=False)
    assert len(plan.groups) == 4 and not plan.refusals
    assert_sections_equal(source, fused, 2)


@pytest.mark.parametrize("fmt", ["fp8_tensor", "ct_int8_channel_asym", "modelopt_nvfp4"])
def test_sections_of_ragged_modules(fmt: str, tmp_path: Path) -> None:
    source, fused = hf_formats.save(fmt, tmp_path / "a", ragged=True), tmp_path / "b"
    assert len(convert(source, fused, consumer="torch", sync=False).groups) == 4
    assert_sections_equal(source, fused, 2)


@pytest.mark.parametrize("fmt", ["ct_fp8_tensor_static", "ct_fp8_tensor_dynamic"])
def test_unequal_scales_expand_to_identical_values(fmt: str, tmp_path: Path) -> None:
    need(fmt)
    source, fused = hf_formats.save(fmt, tmp_path / "a", unequal="v_proj"), tmp_path / "b"
    plan = convert(source, fused, consumer="torch", sync=False)
    assert len(plan.groups) == 4 and not plan.refusals
    tensors = open_checkpoint(fused).tensors
    shapes = [
        tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight_scale"].shape for layer in (0, 1)
    ]
    assert shapes == [(512, 1), (1,)]
    assert_sections_equal(source, fused, 2)


def test_a_changed_scale_changes_values(tmp_path: Path) -> None:
    """The comparison above can fail."""
    source, fused = hf_formats.save("fp8_block", tmp_path / "a", layers=1), tmp_path / "b"
    convert(source, fused, consumer="torch", sync=False)
    name = "model.layers.0.self_attn.qkv_proj.weight_scale_inv"
    tensor = open_checkpoint(fused).tensors[name]
    with open(fused / "model.safetensors", "r+b") as file:
        file.seek(tensor.offset + tensor.size - 4)
        byte = file.read(1)[0]
        file.seek(tensor.offset + tensor.size - 4)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(AssertionError, match="v_proj"):
        assert_sections_equal(source, fused, 1)


def test_nothing_else_is_imported() -> None:
    code = (
        "import sys, fuseweights.dequantize as d;"
        "print('torch' in sys.modules, [v for v in vars(d).values() "
        "if getattr(v, '__module__', '').startswith('fuseweights.') "
        "and v.__module__ != 'fuseweights.dequantize'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False []\n"
    code = "import sys, fuseweights.cli; print('fuseweights.dequantize' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
