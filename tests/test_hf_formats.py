"""Every quantization format: refused by name, or fused, proven and restored; its config edited."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_formats  # noqa: E402
from raw_safetensors import there_and_back, write  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import RefusedError  # noqa: E402

REFUSED = {
    "bnb_nf4_nested": "nested (double quantized) scales",
    "awq_gemv": "AWQ's gemv layout",
    "marlin": "GPTQ repacked as marlin",
    "hqq": "quantization method 'hqq'",
    "torchao": "quantization method 'torchao'",
}
FUSED = [fmt for fmt in hf_formats.FORMATS if fmt not in REFUSED]
PLAIN = [fmt for fmt in FUSED if fmt.startswith("plain")]
#: Whose experts have nothing that cannot be stacked.
EXPERTS = [
    *PLAIN, "fp8_block", "fp8_block_bf16_scale", "fp8_block_e8m0", "ct_fp8_block",
    "ct_fp8_channel", "ct_int8_channel", "ct_int8_channel_asym", "ct_mxfp4",
]  # fmt: skip
CORE = ["plain", "fp8_block", "ct_fp8_channel", "ct_int4_asym", "modelopt_nvfp4", "gptq_desc_act"]
CORE += ["awq", "bnb_nf4", "bnb_int8", "ct_mxfp4"]
QUANT = "quantization_config"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(fmt: str, directory: Path, **knobs: Any) -> Path:
    if library := hf_formats.FORMATS[fmt].library:
        pytest.importorskip(library.replace("-", "_"))
    return hf_formats.save(fmt, directory, **knobs)


def slow_unless_core(formats: list[str]) -> list:
    return [pytest.param(f, marks=[pytest.mark.slow] * (f not in CORE)) for f in formats]


def test_every_format_is_in_a_list():
    assert {*FUSED, *REFUSED} == hf_formats.FORMATS.keys()
    assert {f for f, row in hf_formats.FORMATS.items() if row.refused} <= REFUSED.keys()


# --- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", REFUSED)
def test_refused_by_name(fmt: str, tmp_path: Path) -> None:
    src = saved(fmt, tmp_path / "src")
    for consumer in ("torch", "vllm", "sglang"):
        with pytest.raises(RefusedError, match="nothing to fuse") as caught:
            fuseweights.convert(src, tmp_path / "fused", consumer=consumer, sync=False)
        refusals = caught.value.refusals
        assert {r.reason for r in refusals} == {"format-unsupported"} and len(refusals) == 4
        assert all(REFUSED[fmt] in r.detail for r in refusals)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("fmt", FUSED)
def test_format_there_and_back(fmt: str, sharded: bool, tmp_path: Path) -> None:
    shard = 100_000 if sharded else None
    src = saved(fmt, tmp_path / "src", kv_scales=True, max_shard_size=shard)
    plan = there_and_back(src, tmp_path)
    assert Counter(group.group for group in plan.groups) == {"qkv": 2, "gate_up": 2}
    assert not plan.refusals
    found = fuseweights.verify(src, tmp_path / "fused", values=True)
    assert found.ok and not found.notes
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "fused")
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn."
        for name in (f"{attention}k_proj.k_scale", f"{attention}v_proj.v_scale"):
            assert torch.equal(old[name], new[name])
        for fused, parts in hf_formats.groups(layer).items():
            true = torch.cat([hf_formats.dequantize(fmt, old, part) for part in parts])
            assert torch.equal(hf_formats.dequantize(fmt, new, fused), true)
    across = [g for g in plan.groups if len({p.file for p in g.tensors[0].parts}) > 1]
    assert bool(across) == sharded


@pytest.mark.parametrize("fmt", slow_unless_core(FUSED))
def test_gated_delta_net(fmt: str, tmp_path: Path) -> None:
    """b and a stay unquantized in official checkpoints: two pairs, but for plain ones."""
    src = saved(fmt, tmp_path / "src", model="qwen3_5")
    plan = there_and_back(src, tmp_path)
    mixer = ["gdn_in_proj"] if fmt in PLAIN else ["gdn_qkvz", "gdn_ba"]
    assert Counter(group.group for group in plan.groups) == dict.fromkeys([*mixer, "gate_up"], 2)
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "fused")
    for fused, parts in hf_formats.groups(1, "qwen3_5").items():
        true = torch.cat([hf_formats.dequantize(fmt, old, part) for part in parts])
        if fmt in PLAIN and "linear_attn" in fused:
            whole = new["model.layers.1.linear_attn.in_proj.weight"].float()
            read = whole[: len(true)] if "qkvz" in fused else whole[-len(true) :]
        else:
            read = hf_formats.dequantize(fmt, new, fused)
        assert torch.equal(read, true)


@pytest.mark.parametrize("fmt", slow_unless_core(FUSED))
def test_latent_attention_and_experts(fmt: str, tmp_path: Path) -> None:
    src = saved(fmt, tmp_path / "src", model="deepseek_v3")
    plan = there_and_back(src, tmp_path)
    names = ["qkv_a", "shared_gate_up", *["experts"] * (fmt in EXPERTS)]
    assert Counter(group.group for group in plan.groups) == dict.fromkeys(names, 2)
    refused = [] if fmt in EXPERTS else [("experts", "format-unsupported")] * 2
    assert [(r.group, r.reason) for r in plan.refusals] == refused
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "fused")
    for fused, parts in hf_formats.groups(1, "deepseek_v3").items():
        true = torch.cat([hf_formats.dequantize(fmt, old, part) for part in parts])
        if "experts." in fused.replace("shared_experts.", "") and fmt in EXPERTS:
            stacked, number = "model.layers.1.mlp.experts.gate_up_proj", int(fused.split(".")[5])
            local = {
                name.replace(stacked, "weight").replace("weight_packed_scale", "weight_scale"): t
                for name, t in new.items()
                if name.startswith(stacked)
            }
            one = {name: tensor[number] for name, tensor in local.items()}
            if "weight_packed" in one:
                one.pop("weight", None)
            read = hf_formats.dequantize(fmt, {f"x.{k}": v for k, v in one.items()}, "x")
        elif fmt not in EXPERTS and ".experts." in fused:
            assert all(name in new for name in old if name.startswith(tuple(parts)))
            continue
        else:
            read = hf_formats.dequantize(fmt, new, fused)
        assert torch.equal(read, true)


# --- unequal per-tensor scales ------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["ct_fp8_tensor_static", "ct_fp8_tensor_dynamic"])
def test_unequal_scales_become_one_a_row(fmt: str, tmp_path: Path) -> None:
    src = saved(fmt, tmp_path / "src", unequal="k_proj")
    plan = there_and_back(src, tmp_path)
    assert len(plan.groups) == 4 and not plan.refusals
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "fused")
    expanded, same = hf_formats.groups(0), hf_formats.groups(1)
    for fused, parts in [*expanded.items(), *same.items()]:
        scales = [old[f"{part}.weight_scale"] for part in parts]
        rows = [len(old[f"{part}.weight"]) for part in parts]
        read = new[f"{fused}.weight_scale"]
        if len({scale.item() for scale in scales}) == 1:
            assert torch.equal(read, scales[0])
        else:
            assert fused.endswith("layers.0.self_attn.qkv_proj")
            each = [s.expand(n, 1) for s, n in zip(scales, rows, strict=True)]
            assert torch.equal(read, torch.cat(each)) and read.shape == (sum(rows), 1)
        true = torch.cat([hf_formats.dequantize(fmt, old, part) for part in parts])
        assert torch.equal(hf_formats.dequantize(fmt, new, fused), true)
    groups = config_of(tmp_path / "fused")[QUANT]["config_groups"]
    assert groups["group_0"] == config_of(src)[QUANT]["config_groups"]["group_0"]
    weights = {**groups["group_0"]["weights"], "strategy": "channel"}
    targets = ["model.layers.0.self_attn.qkv_proj"]
    assert groups["group_1"] == {**groups["group_0"], "weights": weights, "targets": targets}
    assert groups.keys() == {"group_0", "group_1"}


def test_expanded_scales_keep_the_scheme_of_their_own_group(tmp_path: Path) -> None:
    src = saved("ct_fp8_tensor_dynamic", tmp_path / "src", unequal="k_proj")
    config = config_of(src)
    groups = config[QUANT]["config_groups"]
    ours = {**groups["group_0"], "targets": [r"re:.*self_attn\..*"]}
    other = json.loads(json.dumps({**ours, "targets": [r"re:.*mlp\..*"]}))
    other["weights"] |= {"type": "int", "num_bits": 8}
    config[QUANT]["config_groups"] = {"a": other, "b": ours}
    (src / "config.json").write_text(json.dumps(config))
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    groups = config_of(tmp_path / "fused")[QUANT]["config_groups"]
    (added,) = [groups[name] for name in groups.keys() - {"a", "b"}]
    weights = {**ours["weights"], "strategy": "channel"}
    assert added == {**ours, "weights": weights, "targets": ["model.layers.0.self_attn.qkv_proj"]}


@pytest.mark.parametrize("equal", [True, False])
def test_a_layer_of_one_block_has_a_scale_a_block(tmp_path: Path, equal: bool) -> None:
    tensors = [
        row
        for p in "qkv"
        for name in [f"model.layers.0.self_attn.{p}_proj"]
        for row in (
            (f"{name}.weight", "F8_E4M3", (128, 128), None),
            (f"{name}.weight_scale_inv", "F32", (1, 1), bytes(4) if equal else None),
        )
    ]
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", QUANT: quantization}
    plan = there_and_back(write(tmp_path / "src", tensors, config=config), tmp_path)
    assert [t.shape for t in plan.groups[0].tensors] == [(384, 128), (3, 1)]


# --- the real libraries -------------------------------------------------------------------------

#: Loads on a CPU, and the class of a layer then.
LOADS = {
    "ct_fp8_tensor_dynamic": "k_proj",
    "ct_fp8_tensor_static": "k_proj",
    **dict.fromkeys(
        ["plain", "fp8_block", "fp8_tensor", "ct_int4", "ct_nvfp4", "ct_mxfp4", "ct_fp8_channel"]
    ),
    **dict.fromkeys(["ct_int8_channel", "bnb_nf4", "bnb_int8"]),
}
QUICK = ("ct_fp8_tensor_dynamic", "ct_nvfp4", "fp8_block", "bnb_nf4")


@pytest.mark.parametrize(
    "fmt", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in LOADS]
)
def test_phi3_computes_from_the_fused_what_llama_does_from_the_parts(
    fmt: str, tmp_path: Path
) -> None:
    """Phi-3 is Llama with modules called qkv_proj and gate_up_proj: transformers and the format's
    own library load our directory, and every logit is the same."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    src = saved(fmt, tmp_path / "src", unequal=LOADS[fmt])
    fused = tmp_path / "fused"
    fuseweights.convert(src, fused, sync=False)
    config = config_of(fused)
    assert config.pop("fusion_config") == {"fuseweights": True}
    config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    (fused / "config.json").write_text(json.dumps(config))
    llama = AutoModelForCausalLM.from_pretrained(src)
    phi3, info = AutoModelForCausalLM.from_pretrained(fused, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(llama(tokens).logits, phi3(tokens).logits)
    if LOADS[fmt]:
        schemes = [layer.self_attn.qkv_proj.quantization_scheme for layer in phi3.model.layers]
        assert [str(s.weights.strategy) for s in schemes] == ["channel", "tensor"]


# --- configuration ------------------------------------------------------------------------------


def config_of(directory: Path, name: str = "config.json") -> dict:
    return json.loads((directory / name).read_text())


def check_only_insertions(old: Path, new: Path, ours: tuple[str, ...]) -> None:
    """Line by line, but for commas: what is there was there, or is an entry with one of `ours`."""
    before, after = (path.read_text().split("\n") for path in (old, new))
    bare = [[line.rstrip(",") for line in lines] for lines in (before, after)]
    for tag, a, b, c, d in SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        if tag == "replace":  # a list or object that was empty, or one line of text
            assert (a, c) == (b - 1, d - 1), (before[a:b], after[c:d])
            for text in re.findall(r'"[^"]*"|[^\s,\[\]{}]+', before[a]):
                assert text in after[c]
        elif tag != "equal":
            assert tag == "insert", (tag, before[a:b], after[c:d])
            assert all(any(name in line for name in ours) for line in after[c:d]), after[c:d]


@pytest.mark.parametrize("model", hf_formats.MODELS)
@pytest.mark.parametrize("fmt", slow_unless_core(FUSED))
def test_every_other_character_stays(fmt: str, model: str, tmp_path: Path) -> None:
    src = saved(fmt, tmp_path / "src", model=model)
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    for path in src.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            ours = ("fusion_config", "in_proj_ba")
            check_only_insertions(path, tmp_path / "fused" / path.name, ours)
    config = config_of(tmp_path / "fused")
    assert config.pop("fusion_config") == {"fuseweights": True}
    if model != "qwen3_5":  # nothing that the configuration names has moved
        assert config == config_of(src)


BA = [f"model.layers.{n}.linear_attn.in_proj_ba" for n in (0, 1)]
B = [f"model.layers.{n}.linear_attn.in_proj_{p}" for n in (0, 1) for p in "ba"]
#: Where each format lists what is not quantized: (file, path).
LISTED = {
    "fp8_block": [("config.json", QUANT, "modules_to_not_convert")],
    "fp8_tensor": [("config.json", QUANT, "modules_to_not_convert")],
    "ct_int4": [("config.json", QUANT, "ignore")],
    "ct_nvfp4": [("config.json", QUANT, "ignore")],
    "ct_fp8_tensor_dynamic": [("config.json", QUANT, "ignore")],
    "modelopt_fp8": [
        ("config.json", QUANT, "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ],
    "modelopt_nvfp4": [
        ("config.json", QUANT, "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ],
    "awq": [("config.json", QUANT, "modules_to_not_convert")],
    "bnb_nf4": [("config.json", QUANT, "llm_int8_skip_modules")],
    "bnb_int8": [("config.json", QUANT, "llm_int8_skip_modules")],
}


@pytest.mark.parametrize("fmt", LISTED)
def test_unquantized_modules_are_listed_by_the_fused_name_too(fmt: str, tmp_path: Path) -> None:
    src = saved(fmt, tmp_path / "src", model="qwen3_5")
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    for file, *path in LISTED[fmt]:
        before, after = config_of(src, file), config_of(tmp_path / "fused", file)
        for key in path[:-1]:
            before, after = before[key], after[key]
        assert set(B) < set(before[path[-1]])
        assert after[path[-1]] == [*before[path[-1]], *BA]


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2", "gptq_int8"])
def test_gptqs_rules_hold_for_the_fused_name(fmt: str, tmp_path: Path) -> None:
    """As the engines apply them: the first pattern that matches the fused module's own name."""
    src = saved(fmt, tmp_path / "src", model="qwen3_5")
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    for file, *path in (("config.json", QUANT), ("quantize_config.json",)):
        before, after = config_of(src, file), config_of(tmp_path / "fused", file)
        for key in path:
            before, after = before[key], after[key]
        assert list(after["dynamic"])[: len(before["dynamic"])] == list(before["dynamic"])
        for name in (*B, *BA):
            assert gptq_rule(after["dynamic"], name) is False
        for name in ("model.layers.0.linear_attn.in_proj_qkvz", "model.layers.1.mlp.gate_up_proj"):
            assert gptq_rule(after["dynamic"], name) is None


def gptq_rule(dynamic: dict, name: str) -> dict | bool | None:
    """vLLM's get_dynamic_override: False where the module is not quantized."""
    for pattern, override in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return override
    return None


QKV = [f"model.layers.{n}.self_attn.qkv_proj" for n in (0, 1)]
GATE_UP = [f"model.layers.{n}.mlp.gate_up_proj" for n in (0, 1)]
PARTS = [
    f"model.layers.{n}.{part}_proj"
    for n in (0, 1)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
]


def targets(*given: str) -> Callable[[dict], None]:
    def edit(config: dict) -> None:
        config[QUANT]["config_groups"]["group_0"]["targets"] = list(given)

    return edit


def entry(key: str, value: object) -> Callable[[dict], None]:
    return lambda config: config[QUANT].update({key: value})


NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}
#: (format, edit, path below quantization_config, what is added there)
EDITS: dict[str, tuple[str, Callable[[dict], None], tuple[str, ...], list | dict]] = {
    "classes": ("ct_int4", targets("Linear"), ("config_groups", "group_0", "targets"), []),
    "patterns that match": (
        "ct_int4",
        targets(r"re:.*self_attn\..*", "re:.*mlp.*"),
        ("config_groups", "group_0", "targets"),
        [],
    ),
    "patterns that do not": (
        "ct_int4",
        targets(r"re:.*\.[qkvo]_proj$", "re:.*mlp.*"),
        ("config_groups", "group_0", "targets"),
        QKV,
    ),
    "names": (
        "ct_fp8_channel",
        targets(*PARTS, "re:.*(o|down)_proj"),
        ("config_groups", "group_0", "targets"),
        # by rule: attention first, then the MLP
        [*QKV, *GATE_UP],
    ),
    "a rule of its own": (
        "gptq",
        entry("dynamic", {r"+:.*\.(q|k|v)_proj$": {"bits": 4}, r"+:.*mlp.*": {"bits": 4}}),
        ("dynamic",),
        {rf"+:model\.layers\.{n}\.self_attn\.qkv_proj$": {"bits": 4} for n in (0, 1)},
    ),
    "a bare rule": (
        "gptq",
        entry("dynamic", {r".*\.layers\.1\.mlp\.(gate|up)_proj$": {"bits": 4}}),
        ("dynamic",),
        {r"model\.layers\.1\.mlp\.gate_up_proj$": {"bits": 4}},
    ),
    "layers by name": (
        "modelopt_nvfp4",
        entry("quantized_layers", dict.fromkeys(PARTS, NVFP4)),
        ("quantized_layers",),
        dict.fromkeys([*QKV, *GATE_UP], NVFP4),
    ),
    "nothing listed": ("awq", entry("modules_to_not_convert", None), (), []),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_names_the_parts_names_the_fused_module(case: str, tmp_path: Path) -> None:
    fmt, edit, path, added = EDITS[case]
    src = saved(fmt, tmp_path / "src")
    config = config_of(src)
    edit(config)
    (src / "config.json").write_text(json.dumps(config, indent=2))
    (tmp_path / "trip").mkdir()
    assert not there_and_back(src, tmp_path / "trip").refusals
    after = config_of(tmp_path / "trip" / "fused")
    assert after.pop("fusion_config")
    here = config[QUANT]
    for key in path[:-1]:
        here = here[key]
    if path:
        was = here[path[-1]]
        here[path[-1]] = [*was, *added] if isinstance(added, list) else was | added
    assert after == config


def test_what_hqq_skips_is_listed_too(tmp_path: Path) -> None:
    src = saved("hqq", tmp_path / "src", model="qwen3_5")
    plan = there_and_back(src, tmp_path)
    if plan.groups:
        assert set(BA) <= set(config_of(tmp_path / "fused")[QUANT]["skip_modules"])


def test_torchaos_header_speaks_of_the_tensors_that_are_there(tmp_path: Path) -> None:
    from safetensors import safe_open

    src = saved("torchao", tmp_path / "src", model="qwen3_5")
    try:
        fuseweights.convert(src, tmp_path / "fused", sync=False)
    except RefusedError:
        return
    with safe_open(tmp_path / "fused" / "model.safetensors", "pt") as file:
        named, stored = json.loads(file.metadata()["tensor_names"]), set(file.keys())
    assert {name for name in named if "in_proj_" in name and name.endswith("b.weight")} <= stored


@pytest.mark.parametrize("consumer", ["torch", "vllm"])
def test_ignored_by_wildcard_is_ignored_by_name(tmp_path: Path, consumer: str) -> None:
    """No pattern has to be understood: what is plain is listed by the fused name, if listed."""
    src = saved("modelopt_nvfp4", tmp_path / "src", model="qwen3_5")
    config = config_of(src, "hf_quant_config.json")
    config["quantization"]["exclude_modules"] = ["lm_head", "*in_proj_[ab]"]
    (src / "hf_quant_config.json").write_text(json.dumps(config))
    plan = there_and_back(src, tmp_path, consumer=consumer)
    after = config_of(tmp_path / "fused", "hf_quant_config.json")["quantization"]
    fused = [n for g in plan.groups for n in BA if g.tensors[0].name == f"{n}.weight"]
    assert fused == (BA if consumer == "torch" else [])
    assert after["exclude_modules"] == ["lm_head", "*in_proj_[ab]", *fused]
    assert all(any(fnmatch.fnmatch(n, p) for p in after["exclude_modules"]) for n in (*B, *fused))


@pytest.mark.parametrize(
    "fmt, suffix, change",
    [
        ("ct_int4", "weight_shape", lambda raw: torch.tensor([7, int(raw[1])])),
        (
            "bnb_nf4",
            "weight.quant_state.bitsandbytes__nf4",
            lambda raw: torch.tensor(
                list(bytes(raw.tolist()).replace(b"[", b"[1")), dtype=torch.uint8
            ),
        ),
    ],
)
def test_a_shape_that_is_not_its_weights_is_not_stacked(fmt, suffix, change, tmp_path):
    from safetensors.torch import load_file, save_file

    src = saved(fmt, tmp_path / "src")
    path = src / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    refusals = fuseweights.plan(src).refusals
    assert [(r.group, r.layer, r.reason) for r in refusals] == [("qkv", 0, "format-unsupported")]
    assert "does not describe its weight" in refusals[0].detail
