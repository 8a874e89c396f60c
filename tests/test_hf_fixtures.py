"""The Hugging Face fixtures against the libraries that define their layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import engine_mapping  # noqa: E402
import hf_formats  # noqa: E402
import hf_models  # noqa: E402

V_PROJ = "model.layers.0.self_attn.v_proj"

#: The relative error that the format's bits allow.
LOSS = {"fp8": 0.03, "int8": 0.01, "nvfp4": 0.1, "mxfp4": 0.12, "fp4": 0.13, "plain": 0.002}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Everything here is tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def need(fmt: str) -> None:
    library = hf_formats.FORMATS[fmt].library
    if library:
        pytest.importorskip(library.replace("-", "_"))


def local(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    prefix = f"{prefix}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_every_family_is_written(family: str, tmp_path: Path) -> None:
    hf_models.save(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] and config["model_type"]
    tensors = hf_formats.load(tmp_path)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    raw = [t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    large = [data for data in raw if len(data) >= 64]
    assert len(set(large)) == len(large), "tensors must be tellable from each other"


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe"])
def test_experts_come_split_or_stacked(family: str, tmp_path: Path) -> None:
    for original in (True, False):
        path = hf_models.save(family, tmp_path / str(original), original_format=original)
        stacked = [n for n in hf_formats.load(path) if n.endswith("experts.gate_up_proj")]
        assert bool(stacked) != original


def test_families_shard_and_repeat(tmp_path: Path) -> None:
    first, second = (
        hf_models.save("llama", tmp_path / name, max_shard_size="60KB") for name in "ab"
    )
    names = sorted(path.name for path in first.iterdir())
    assert "model.safetensors.index.json" in names and "model-00001-of-00003.safetensors" in names
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


@pytest.mark.parametrize("fmt", hf_formats.FORMATS)
def test_dequantize_comes_near_the_original(fmt: str, tmp_path: Path) -> None:
    need(fmt)
    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path / fmt))
    original = hf_formats.load(hf_formats.save("plain_f32", tmp_path / "original"))
    limit = next((limit for name, limit in LOSS.items() if name in fmt), 0.13)
    for members in hf_formats.groups().values():
        for name in members:
            try:
                read = hf_formats.dequantize(fmt, tensors, name)
            except NotImplementedError:
                assert hf_formats.FORMATS[fmt].refused
                continue
            want = original[f"{name}.weight"]
            assert read.shape == want.shape
            assert (read - want).norm() / want.norm() < limit


@pytest.mark.parametrize("model", ["qwen3_5", "deepseek_v3"])
@pytest.mark.parametrize("fmt", ["fp8_block", "modelopt_nvfp4", "gptq", "bnb_nf4"])
def test_other_models_dequantize_too(fmt: str, model: str, tmp_path: Path) -> None:
    need(fmt)
    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path / fmt, model=model))
    original = hf_formats.load(hf_formats.save("plain_f32", tmp_path / "original", model=model))
    for members in hf_formats.groups(1, model).values():
        for name in members:
            want = original[f"{name}.weight"]
            read = hf_formats.dequantize(fmt, tensors, name)
            assert (read - want).norm() / want.norm() < 0.13
    listed = (tmp_path / fmt / "config.json").read_text().count("in_proj_b")
    assert bool(listed) == (model == "qwen3_5")


@pytest.mark.parametrize(
    "fmt, model",
    [
        *((fmt, "llama") for fmt in ("plain_bias", "fp8_tensor", "ct_int4", "ct_nvfp4", "bnb_nf4")),
        *(("fp8_block", model) for model in hf_formats.MODELS),
    ],
)
def test_transformers_loads_what_it_can_run_here(fmt: str, model: str, tmp_path: Path) -> None:
    need(fmt)
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    hf_formats.save(fmt, tmp_path, model=model)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "fmt", [name for name, row in hf_formats.FORMATS.items() if row.library == "compressed-tensors"]
)
def test_dequantize_equals_compressed_tensors(fmt: str, ragged: bool, tmp_path: Path) -> None:
    need(fmt)
    from compressed_tensors.compressors import BaseCompressor

    row = hf_formats.FORMATS[fmt]
    settings = row.pack.keywords
    scheme = hf_formats._ct_scheme(settings["weights"], settings.get("activations"))
    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path, ragged=ragged))
    state = local(tensors, V_PROJ)
    read = hf_formats.dequantize(fmt, tensors, V_PROJ)
    if (g_idx := state.pop("weight_g_idx", None)) is not None:
        # the library has dropped activation order: give it the columns in group order
        order = torch.argsort(g_idx, stable=True)
        columns = hf_formats.unpack_bits(state["weight_packed"], 4, len(order))
        state["weight_packed"] = hf_formats.pack_bits(columns[:, order], 4)
        read = read[:, order]
    if state["weight_scale"].dtype == torch.bfloat16:  # let it multiply without rounding
        state["weight_scale"] = state["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(settings["layout"])
    theirs = compressor.decompress(state, scheme)["weight"]
    assert torch.equal(read.to(theirs.dtype), theirs)


@pytest.mark.parametrize("fmt", ["bnb_nf4", "bnb_fp4", "bnb_nf4_nested", "bnb_int8"])
@pytest.mark.parametrize("ragged", [False, True])
def test_dequantize_equals_bitsandbytes(fmt: str, ragged: bool, tmp_path: Path) -> None:
    need(fmt)
    from bitsandbytes import functional

    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path, ragged=ragged))
    state = local(tensors, V_PROJ)
    read = hf_formats.dequantize(fmt, tensors, V_PROJ)
    if fmt == "bnb_int8":
        theirs = functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
        torch.testing.assert_close(read, theirs, rtol=1e-6, atol=0)
        return
    packed = state.pop("weight")
    quant_state = functional.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in state.items()}, device=torch.device("cpu")
    )
    quant_state.dtype = torch.float32
    assert torch.equal(read, functional.dequantize_4bit(packed, quant_state))


@pytest.mark.parametrize("fmt, scale_fmt", [("fp8_block", "float"), ("fp8_block_e8m0", "ue8m0")])
def test_block_fp8_equals_transformers(fmt: str, scale_fmt: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path / fmt))
    original = hf_formats.load(hf_formats.save("plain_f32", tmp_path / "original"))
    name = f"{V_PROJ}.weight"
    theirs = Fp8Quantize(hf_formats.fine_grained(scale_fmt)).convert({name: original[name]})
    weight, scale = theirs[name], theirs[f"{name}_scale_inv"]
    assert tensors[f"{name}_scale_inv"].dtype == scale.dtype
    ours = tensors[f"{name}_scale_inv"].float()
    torch.testing.assert_close(ours, scale.float(), rtol=1e-6, atol=0)
    equal = tensors[name].view(torch.uint8) == weight.view(torch.uint8)
    assert equal.float().mean() > 0.999  # they divide by another rounding of the scale


def test_modelopt_nvfp4_is_the_other_convention_of_the_same(tmp_path: Path) -> None:
    need("ct_nvfp4")
    modelopt = hf_formats.load(hf_formats.save("modelopt_nvfp4", tmp_path / "modelopt"))
    theirs = hf_formats.load(hf_formats.save("ct_nvfp4", tmp_path / "ct"))
    one, other = local(modelopt, V_PROJ), local(theirs, V_PROJ)
    torch.testing.assert_close(1 / one["weight_scale_2"], other["weight_global_scale"][0])
    torch.testing.assert_close(1 / one["input_scale"], other["input_global_scale"][0])
    same = one["weight"] == other["weight_packed"]
    assert same.float().mean() > 0.99


def test_gptq_and_awq_equal_their_formulas(tmp_path: Path) -> None:
    """Bit by bit in plain Python, for a few elements."""
    random = torch.Generator().manual_seed(7)
    picks = torch.randint(0, 128, (50, 2), generator=random).tolist()
    for fmt, offset in [("gptq", 1), ("gptq_desc_act", 1), ("gptq_v2", 0)]:
        tensors = hf_formats.load(hf_formats.save(fmt, tmp_path / fmt))
        read, t = hf_formats.dequantize(fmt, tensors, V_PROJ), local(tensors, V_PROJ)
        for n, k in picks:
            group = int(t["g_idx"][k])
            value = int(t["qweight"][k // 8, n]) >> 4 * (k % 8) & 15
            zero = (int(t["qzeros"][group, n // 8]) >> 4 * (n % 8) & 15) + offset
            assert read[n, k] == (value - zero) * t["scales"][group, n].float()
    tensors = hf_formats.load(hf_formats.save("awq", tmp_path / "awq"))
    read, t = hf_formats.dequantize("awq", tensors, V_PROJ), local(tensors, V_PROJ)
    nibble = [0, 4, 1, 5, 2, 6, 3, 7]  # where AutoAWQ's reverse order finds each column
    for n, k in picks:
        shift = 4 * nibble[n % 8]
        value = int(t["qweight"][k, n // 8]) >> shift & 15
        zero = int(t["qzeros"][k // 64, n // 8]) >> shift & 15
        assert read[n, k] == (value - zero) * t["scales"][k // 64, n].float()


SHARED = {
    "fp8_tensor": "weight_scale_inv",
    "ct_fp8_tensor_static": "weight_scale",
    "ct_fp8_tensor_dynamic": "weight_scale",
    "modelopt_fp8": "weight_scale",
    "modelopt_nvfp4": "weight_scale_2",
    "ct_nvfp4": "weight_global_scale",
    "ct_nvfp4a16": "weight_global_scale",
    "bnb_nf4": "weight.quant_map",
    "bnb_int8": "weight_format",
}
INPUT = {
    "fp8_tensor": "activation_scale",
    "fp8_block_static": "activation_scale",
    "ct_fp8_tensor_static": "input_scale",
    "ct_int8_channel_static": "input_scale",
    "modelopt_fp8": "input_scale",
    "modelopt_nvfp4": "input_scale",
    "ct_nvfp4": "input_global_scale",
}
G_IDX = {"gptq_desc_act": "g_idx", "gptq_v2_desc_act": "g_idx", "ct_int4_g_idx": "weight_g_idx"}
KNOBS = {"unequal": SHARED, "unequal_input": INPUT, "g_idx_differs": G_IDX}


@pytest.mark.parametrize(
    "fmt, knob, companion",
    [(fmt, knob, companion) for knob, table in KNOBS.items() for fmt, companion in table.items()],
)
def test_a_knob_changes_one_part_of_one_layer(
    fmt: str, knob: str, companion: str, tmp_path: Path
) -> None:
    need(fmt)
    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path, **{knob: "v_proj"}))
    first, second = (
        [tensors[f"{name}.{companion}"] for name in members]
        for index in (0, 1)
        for fused, members in hf_formats.groups(index).items()
        if "qkv" in fused
    )
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert torch.equal(second[0], second[1]) and torch.equal(second[0], second[2])


def test_a_knob_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing that this knob changes"):
        hf_formats.save("gptq", tmp_path, unequal="v_proj")


#: How the companions of a part merge, where it is not by rows.
COLUMNS = {"qweight", "qzeros", "scales"}
KEPT = {
    "g_idx",
    "weight_g_idx",
    "weight.quant_map",
    "weight_format",
    "weight_scale_2",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "activation_scale",
}


def merge(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fused = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in KEPT or values[0].ndim == 0 or values[0].shape == (1,):
            fused[name] = values[0]
        elif name == "weight_shape":
            fused[name] = torch.stack([sum(v[0] for v in values), values[0][1]])
        elif ".quant_state." in name:
            states = [json.loads(bytes(v.tolist())) for v in values]
            states[0]["shape"][0] = sum(state["shape"][0] for state in states)
            fused[name] = torch.tensor(list(json.dumps(states[0]).encode()), dtype=torch.uint8)
        else:
            raw = [v.view(torch.uint8) if v.element_size() == 1 else v for v in values]
            fused[name] = torch.cat(raw, 1 if name in COLUMNS else 0).view(values[0].dtype)
    return fused


@pytest.mark.parametrize(
    "fmt",
    [n for n, row in hf_formats.FORMATS.items() if not row.refused and n != "bnb_nf4_nested"],
)
def test_dequantize_reads_fused_tensors(fmt: str, tmp_path: Path) -> None:
    need(fmt)
    tensors = hf_formats.load(hf_formats.save(fmt, tmp_path))
    for members in hf_formats.groups().values():
        fused = merge([local(tensors, name) for name in members])
        named = {f"fused.{name}": value for name, value in fused.items()}
        want = torch.cat([hf_formats.dequantize(fmt, tensors, name) for name in members])
        assert torch.equal(hf_formats.dequantize(fmt, named, "fused"), want)


def test_the_other_knobs(tmp_path: Path) -> None:
    def names(knob: str, **knobs: object) -> dict[str, torch.Tensor]:
        return hf_formats.load(hf_formats.save("gptq", tmp_path / knob, **knobs))

    assert not any(V_PROJ in name for name in names("missing", missing="v_proj"))
    assert f"{V_PROJ}.mystery" in names("unknown", unknown="v_proj")
    assert f"{V_PROJ}.bias" in names("bias", bias_on=("v_proj",))
    assert names("dtype", dtype_differs="v_proj")[f"{V_PROJ}.scales"].dtype == torch.float32
    assert names("ragged", ragged=True)[f"{V_PROJ}.scales"].shape[1] == 10
    assert f"{V_PROJ}.v_scale" in names("kv", kv_scales=True)
    assert f"{V_PROJ}.weight" in names("plain", unquantized="v_proj")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["quantization_config"]["dynamic"] == {rf"-:^{V_PROJ}$".replace(".", r"\."): {}}


PARTS = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"},
    "linear_attn": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    "mlp": {"gate_proj", "up_proj"},
    "shared_expert": {"gate_proj", "up_proj"},
    "shared_experts": {"gate_proj", "up_proj"},
    "self": {"query", "key", "value"},
}


@pytest.mark.parametrize(
    "engine, family",
    [(engine, family) for engine, rows in engine_mapping.ENGINES.items() for family in rows],
)
def test_engines_load_the_parts_of_what_transformers_writes(
    engine: str, family: str, tmp_path: Path
) -> None:
    hf_models.save(family, tmp_path)
    for name in hf_formats.load(tmp_path):
        *_, parent, part, suffix = ["", "", *name.split(".")][-3:]
        if "vis" in name or suffix != "weight" or part not in PARTS.get(parent, ()):
            continue
        outcome = engine_mapping.outcome(engine, family, name)
        assert outcome.verdict == "loads" and outcome.shard is not None, (name, outcome)


@pytest.mark.parametrize(
    "engine, family, module, verdict, looked_up",
    [
        ("vllm", "llama", "self_attn.qkv_proj", "loads", "self_attn.qkv_proj"),
        ("vllm", "qwen3_5", "linear_attn.in_proj_qkvz", "raises", "linear_attn.in_proj_qkvzz"),
        ("vllm", "deepseek_v3", "mlp.gate_up_proj", "raises", "mlp.gate_gate_up_proj"),
        ("vllm", "llama4", "self_attn.qkv_proj", "wrong", "self_attn.qkv_proj"),
        ("sglang", "qwen3", "self_attn.qkv_proj", "raises", "self_attn.qkqkv_proj"),
        ("sglang", "qwen2", "mlp.gate_up_proj", "dropped", "mlp.gate_gate_up_proj"),
        ("sglang", "qwen3_5", "linear_attn.in_proj_qkvz", "loads", "linear_attn.in_proj_qkvz"),
        (
            "sglang",
            "deepseek_v3",
            "self_attn.fused_qkv_a_proj_with_mqa",
            "dropped",
            "self_attn.fused_qkv_a_proj_with_mqa",
        ),
    ],
)
def test_what_engines_make_of_fused_names(
    engine: str, family: str, module: str, verdict: str, looked_up: str
) -> None:
    prefix = "model.layers.0."
    outcome = engine_mapping.outcome(engine, family, f"{prefix}{module}.weight")
    assert (outcome.verdict, outcome.name) == (verdict, f"{prefix}{looked_up}.weight")
    assert outcome.shard is None or verdict != "loads"
