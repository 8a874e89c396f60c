"""Each guard on each format: it fires, the group stays, its neighbours fuse; without it, harm.

The harm is one of these, and each row says which:

    breaks      planning or writing fails
    unreadable  what is written is no safetensors file
    shape       the fused tensors do not fit each other, or rows are missing
    numbers     the fused module's dequantized weights are not those of its parts
    kept        a companion that is kept once is another part's
    engine      the engine fails on the fused name, or drops it
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import engine_mapping  # noqa: E402
import hf_formats  # noqa: E402
import hf_models  # noqa: E402
from raw_safetensors import tensors_of, there_and_back  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import CorruptError, RefusedError, guards  # noqa: E402
from fuseweights.layout.config import module_of  # noqa: E402

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], None]
GUARDS = {guard.__name__: guard for guard in guards.GUARDS}
LAYER = "model.layers.0"
V_PROJ = f"{LAYER}.self_attn.v_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- edits of a checkpoint on disk --------------------------------------------------------------


def tensors(change: Callable[[Tensors], object]) -> Edit:
    def edit(directory: Path) -> None:
        found = hf_formats.load(directory)
        change(found)
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def changed(suffix: str, make: Callable[[torch.Tensor], torch.Tensor], part: str = V_PROJ) -> Edit:
    name = f"{part}.{suffix}"
    return tensors(lambda found: found.update({name: make(found[name])}))


def without(suffix: str) -> Edit:
    return tensors(lambda found: found.pop(f"{V_PROJ}.{suffix}"))


def with_the_fused_name(found: Tensors) -> None:
    q_proj = f"{LAYER}.self_attn.q_proj."
    copies = {name: found[name].clone() for name in found if name.startswith(q_proj)}
    found.update({name.replace("q_proj", "qkv_proj"): copy for name, copy in copies.items()})


def configured(*path: str, value: object) -> Edit:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (directory / "config.json").write_text(json.dumps(config, indent=2))

    return edit


# --- the matrix ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """`model` is one of hf_formats; without one, `fmt` is a family of hf_models."""

    guard: str
    reason: str
    sentence: str
    fmt: str
    knobs: Mapping[str, Any]
    harm: str | None = None
    edit: Edit | None = None
    model: str | None = "llama"
    group: str = "qkv"
    layers: tuple[int, ...] = (0,)  # those that are refused
    consumer: str = "torch"
    fuse: tuple[str, ...] | None = None


def rows(
    guard: str,
    reason: str,
    sentence: str,
    formats: Iterable[str] | Mapping[str, str],
    harm: str | Mapping[str, str] | None = None,
    edit: Edit | Callable[[str], Edit] | None = None,
    knobs: Mapping[str, Any] | None = None,
    **more: Any,
) -> Iterator[Row]:
    """A row a format. `{}` in the sentence is what a mapping of formats says of each."""
    for fmt in formats:
        named = formats[fmt] if isinstance(formats, Mapping) else fmt
        said = sentence.replace("{}", named)
        hurts = harm.get(fmt, harm[""]) if isinstance(harm, Mapping) else harm
        make = edit(named) if edit is without else edit
        yield Row(guard, reason, said, fmt, knobs or {}, hurts, make, **more)


REFUSED = [name for name, row in hf_formats.FORMATS.items() if row.refused]
NESTED = "bnb_nf4_nested"
KNOWN = [name for name in hf_formats.FORMATS if name not in (*REFUSED, NESTED)]
PLAIN = [name for name in KNOWN if name.startswith("plain")]
GPTQ = [name for name in KNOWN if name.startswith("gptq")]
BNB4 = ["bnb_nf4", "bnb_fp4"]
BLOCKS = [name for name in KNOWN if "fp8_block" in name]
PACKED = [f"ct_int{kind}" for kind in ("4", "4_asym", "4_channel", "8", "8_group", "8_asym")]
PACKED += ["ct_int4_g_idx", "ct_nvfp4", "ct_nvfp4a16", "ct_mxfp4"]
BOTH = {"layers": (0, 1)}  # the knob is the whole model's

#: The companion with one value a layer that `unequal` changes, and with one for the input.
ONE_SCALE = {
    "fp8_tensor": "weight_scale_inv",
    "modelopt_fp8": "weight_scale",
    "modelopt_nvfp4": "weight_scale_2",
    "ct_nvfp4": "weight_global_scale",
    "ct_nvfp4a16": "weight_global_scale",
}
INPUT_SCALE = {
    "fp8_block_static": "activation_scale",
    "fp8_tensor": "activation_scale",
    "ct_fp8_tensor_static": "input_scale",
    "ct_int8_channel_static": "input_scale",
    "modelopt_fp8": "input_scale",
    "modelopt_nvfp4": "input_scale",
    "ct_nvfp4": "input_global_scale",
}
#: A companion that stacks, a row of the weight or more a row of it.
STACKED = {
    "fp8_block": "weight_scale_inv",
    "fp8_block_bf16_scale": "weight_scale_inv",
    "ct_fp8_block": "weight_scale",
    "ct_fp8_channel": "weight_scale",
    "ct_int8_channel": "weight_scale",
    "ct_int8_channel_asym": "weight_zero_point",
    "ct_int4": "weight_scale",
    "ct_int4_asym": "weight_zero_point",
    "ct_nvfp4": "weight_scale",
    "ct_mxfp4": "weight_scale",
    "modelopt_nvfp4": "weight_scale",
    "gptq": "qzeros",
    "awq": "scales",
    "bnb_nf4": "weight.absmax",
    "bnb_int8": "SCB",
}
#: How many rows share a scale, a zero point's word or a nibble's block, where k and v have 10.
RAGGED = {
    **dict.fromkeys(BLOCKS, "10 rows, no multiple of the 128"),
    **dict.fromkeys(GPTQ, "10 rows, no multiple of the 8"),
    "ct_int4_asym": "10 rows, no multiple of the 8",
    "gptq_int8": "10 rows, no multiple of the 4",
    "ct_int8_asym": "10 rows, no multiple of the 4",
    **dict.fromkeys(BNB4, "360 rows, no multiple of the 32"),
}
#: The weight and the dimension of its columns.
COLUMNS = {
    **{fmt: ("weight", 1) for fmt in KNOWN if fmt not in BNB4},
    **{fmt: ("weight_packed", 1) for fmt in PACKED},
    **{fmt: ("qweight", 0) for fmt in (*GPTQ, "awq")},
}
FLOATS = {fmt: "weight_scale" for fmt in KNOWN if fmt.startswith("ct_") and "nvfp4" not in fmt}
FLOATS |= {fmt: "weight_scale_inv" for fmt in BLOCKS if fmt.startswith("fp8")}
FLOATS |= {fmt: "scales" for fmt in (*GPTQ, "awq")}
FLOATS |= {fmt: "weight" for fmt in PLAIN} | {"bnb_int8": "SCB"}
del FLOATS["ct_mxfp4"]


def narrowed(fmt: str) -> Edit:
    suffix, axis = COLUMNS[fmt]
    return changed(suffix, lambda t: t.narrow(axis, 0, t.shape[axis] // 2).clone())


def recast(suffix: str) -> Edit:
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
    return changed(suffix, lambda t: t.float().to(other.get(t.dtype, torch.float32)))


def shortened(suffix: str) -> Edit:
    """One row less than its weight has."""
    axis = 1 if suffix in ("qzeros", "scales") else 0
    return changed(suffix, lambda t: t.narrow(axis, 0, t.shape[axis] - 1).clone())


ROWS: list[Row] = [
    # the whole checkpoint
    *rows(
        "consumer_loads_it",
        "unknown-architecture",
        "no row says what the layers of model type 'brandnew' hold",
        ["plain", "fp8_block", "gptq"],
        "engine",
        configured("model_type", value="brandnew"),
        consumer="vllm",
        **BOTH,
    ),
    *rows(
        "consumer_loads_it",
        "consumer-unsupported",
        "waits for a partner",
        ["plain", "ct_fp8_channel"],
        "engine",
        model="deepseek_v3",
        group="qkv_a",
        consumer="sglang",
        fuse=("qkv_a",),
        **BOTH,
    ),
    *rows(
        "consumer_loads_it",
        "consumer-unsupported",
        "in_proj_qkvzz",
        ["plain", "fp8_block"],
        "engine",
        model="qwen3_5",
        group="gdn_qkvz",
        consumer="vllm",
        fuse=("gdn_qkvz",),
        **BOTH,
    ),
    *rows(
        "consumer_knows_the_module",
        "consumer-unsupported",
        "vllm is not known to load it fused in vision_tower.encoder.layers.",
        ["gemma3"],
        model=None,
        consumer="vllm",
        **BOTH,
    ),
    *rows(
        "consumer_knows_the_module",
        "consumer-unsupported",
        "vllm is not known to load it fused in mtp.layers.0",
        ["qwen3_5_mtp"],
        model=None,
        consumer="vllm",
    ),
    *rows(
        "consumer_knows_the_module",
        "consumer-unsupported",
        "vllm loads draft layers with code of their own",
        ["deepseek_v3_mtp"],
        model=None,
        group="qkv_a",
        consumer="vllm",
        layers=(2,),
    ),
    # the format
    *rows("format_is_known", "format-unsupported", "", REFUSED, "breaks", **BOTH),
    *rows("format_is_known", "format-unsupported", "nested", [NESTED], "breaks", **BOTH),
    *rows(
        "format_is_known",
        "format-unsupported",
        "the config does not tell how many bits",
        ["ct_int4", "ct_int8_asym"],
        "breaks",
        configured("quantization_config", "config_groups", value={}),
        **BOTH,
    ),
    *rows(
        "format_is_known",
        "format-unsupported",
        "nothing says how quantization method 'exl9'",
        ["fp8_block", "ct_int4", "gptq", "bnb_int8"],
        "breaks",
        configured("quantization_config", "quant_method", value="exl9"),
        **BOTH,
    ),
    *rows(
        "format_is_known",
        "consumer-unsupported",
        "vllm 0.33 has no bitsandbytes of its own",
        [*BNB4, "bnb_int8"],
        consumer="vllm",
        **BOTH,
    ),
    # names
    *rows(
        "fused_name_is_free",
        "name-taken",
        f"{LAYER}.self_attn.qkv_proj exists beside its parts",
        KNOWN,
        "unreadable",
        tensors(with_the_fused_name),
    ),
    *rows(
        "companions_are_known",
        "unknown-companion",
        "nothing says how to merge mystery",
        KNOWN,
        "breaks",
        knobs={"unknown": "v_proj"},
    ),
    *rows(
        "companions_are_known",
        "consumer-unsupported",
        "vllm never loads mlp.experts.gate_up_proj_",
        ["fp8_block", "ct_fp8_channel"],
        "engine",
        configured("model_type", value="qwen3_moe"),
        model="deepseek_v3",
        group="experts",
        consumer="vllm",
        fuse=("experts",),
        **BOTH,
    ),
    *rows(
        "experts_stack_whole",
        "format-unsupported",
        "qweight of many experts cannot be stacked",
        ["gptq", "gptq_int8", "gptq_v2", "awq"],
        "unreadable",
        model="deepseek_v3",
        group="experts",
        **BOTH,
    ),
    *rows(
        "experts_stack_whole",
        "format-unsupported",
        "{} of many experts cannot be stacked",
        {
            "fp8_block_static": "activation_scale",
            "ct_fp8_tensor_dynamic": "weight_scale",
            "ct_int4": "weight_shape",
            "ct_nvfp4": "input_global_scale",
            "modelopt_fp8": "input_scale",
            "bnb_nf4": "weight.quant_map",
            "bnb_int8": "weight_format",
        },
        model="deepseek_v3",
        group="experts",
        **BOTH,
    ),
    # what every part must have
    *rows(
        "parts_are_complete",
        "missing-part",
        "the layer has no self_attn.v_proj",
        KNOWN,
        {"": "breaks", **dict.fromkeys([*PLAIN[:3], *ONE_SCALE, "ct_fp8_tensor_static"], "shape")}
        | {"ct_fp8_tensor_dynamic": "shape"}
        | dict.fromkeys(["modelopt_nvfp4", "ct_nvfp4", "ct_nvfp4a16"], "breaks"),
        knobs={"missing": "v_proj"},
    ),
    *rows(
        "parts_are_complete",
        "bias-mismatch",
        "self_attn.k_proj, self_attn.v_proj has no bias",
        KNOWN,
        {"": "breaks", **dict.fromkeys(BNB4, "shape")},
        knobs={"bias_on": ("q_proj",)},
        **BOTH,
    ),
    *rows(
        "parts_are_complete",
        "scale-mismatch",
        "self_attn.v_proj has no {}",
        STACKED,
        "breaks",
        without,
    ),
    *rows(
        "parts_are_complete",
        "scale-mismatch",
        "self_attn.v_proj has no {}",
        INPUT_SCALE,
        "kept",
        without,
    ),
    *rows(
        "types_agree",
        "type-mismatch",
        "self_attn.v_proj is BF16",
        [fmt for fmt in KNOWN if fmt.startswith(("fp8", "modelopt", "bnb_nf4", "ct_fp8"))],
        knobs={"unquantized": "v_proj"},
    ),
]
for fmt, suffix in FLOATS.items():
    ROWS += rows("types_agree", "type-mismatch", f"{suffix}: ", [fmt], "unreadable", recast(suffix))
for fmt in COLUMNS:
    said = f"{COLUMNS[fmt][0]}: self_attn.q_proj is ["
    ROWS += rows("shapes_agree", "shape-mismatch", said, [fmt], "unreadable", narrowed(fmt))
for fmt, suffix in {**STACKED, "awq": "qzeros"}.items():
    said = f"self_attn.v_proj: {suffix} has "
    ROWS += rows("scales_stay_aligned", "shape-mismatch", said, [fmt], "shape", shortened(suffix))
for fmt, said in RAGGED.items():
    # powers of two may agree by chance
    edit = changed("weight_scale_inv", lambda t: (t.float() * 2).to(t.dtype))
    ROWS += rows(
        "scales_stay_aligned",
        "misaligned-scale-block",
        f"self_attn.k_proj has {said} that share a",
        [fmt],
        "numbers",
        edit if fmt == "fp8_block_e8m0" else None,
        {"ragged": True},
        **BOTH,
    )
ROWS += [
    *rows(
        "scales_stay_aligned",
        "misaligned-scale-block",
        "mlp.experts.0.gate_proj has 120 rows, no multiple of the 128",
        ["fp8_block", "ct_fp8_block"],
        edit=tensors(
            lambda found: found.update(
                {
                    name: tensor[:120].clone()
                    for name, tensor in found.items()
                    if f"{LAYER}.mlp.experts." in name and tensor.shape[0] == 128
                    if "down_proj" not in name
                }
            )
        ),
        model="deepseek_v3",
        group="experts",
    ),
    *rows(
        "kept_values_agree",
        "scale-mismatch",
        "{} differs between the parts",
        ONE_SCALE,
        "numbers",
        knobs={"unequal": "v_proj"},
    ),
    *rows(
        "kept_values_agree",
        "scale-mismatch",
        "weight_format differs",
        ["bnb_int8"],
        "kept",
        knobs={"unequal": "v_proj"},
    ),
    *rows(
        "kept_values_agree",
        "scale-mismatch",
        "{} differs between the parts",
        INPUT_SCALE,
        "kept",
        knobs={"unequal_input": "v_proj"},
    ),
    *rows(
        "kept_values_agree",
        "g-idx-mismatch",
        "g_idx differs",
        ["gptq_desc_act", "gptq_v2_desc_act"],
        "numbers",
        knobs={"g_idx_differs": "v_proj"},
    ),
    *rows(
        "kept_values_agree",
        "g-idx-mismatch",
        "weight_g_idx differs",
        ["ct_int4_g_idx"],
        "numbers",
        knobs={"g_idx_differs": "v_proj"},
    ),
    *rows(
        "kept_values_agree",
        "scale-mismatch",
        "weight.quant_map differs",
        BNB4,
        "numbers",
        changed("weight.quant_map", lambda t: t.flip(0)),
    ),
    *rows(
        "kept_values_agree",
        "type-mismatch",
        "weight.quant_state.bitsandbytes__nf4 differs",
        ["bnb_nf4"],
        "kept",
        changed(
            "weight.quant_state.bitsandbytes__nf4",
            lambda t: torch.tensor(
                list(bytes(t.tolist()).replace(b"bfloat16", b"float16")), dtype=torch.uint8
            ),
        ),
    ),
]


def name(row: Row) -> str:
    said = [*row.knobs] or ["edited" if row.edit else "as it is"]
    return f"{row.guard}-{row.fmt}-{row.reason}-{said[0]}-{row.consumer}"


def saved(row: Row, directory: Path) -> Path:
    if row.model is None:
        return hf_models.save(row.fmt, directory)
    library = hf_formats.FORMATS[row.fmt].library
    if library:
        pytest.importorskip(library.replace("-", "_"))
    hf_formats.save(row.fmt, directory, model=row.model, **row.knobs)
    if row.edit:
        row.edit(directory)
    return directory


#: One of each kind of layout: the other formats' rows of the long tables are for CI.
CORE = [
    "plain", "fp8_block", "fp8_tensor", "ct_fp8_channel", "ct_int4_asym", "ct_nvfp4", "ct_mxfp4",
    "modelopt_nvfp4", "gptq_desc_act", "awq", "bnb_nf4", "bnb_int8",
]  # fmt: skip


def cases(rows: Iterable[Row]) -> list[Any]:
    def table(row: Row) -> tuple:
        return row.guard, row.reason, *row.knobs

    long = Counter(map(table, ROWS))
    return [
        pytest.param(row, id=name(row), marks=[pytest.mark.slow] * slow)
        for row in rows
        for slow in [row.fmt not in CORE and long[table(row)] > len(CORE)]
    ]


@pytest.mark.parametrize("row", cases(ROWS))
def test_guard_fires_and_the_group_stays(row: Row, tmp_path: Path) -> None:
    src = saved(row, tmp_path / "src")
    options = {"consumer": row.consumer, "fuse": row.fuse}
    plan = fuseweights.plan(src, **options)
    refused = [r for r in plan.refusals if r.group == row.group and row.sentence in r.detail]
    assert {(r.reason, r.layer) for r in refused} == {(row.reason, n) for n in row.layers}
    with pytest.raises(RefusedError) as caught:
        fuseweights.convert(src, tmp_path / "strict", strict=True, **options, sync=False)
    assert set(plan.refusals) == set(caught.value.refusals) and caught.value.exit_code == 3
    assert not (tmp_path / "strict").exists()
    if not plan.groups:
        assert row.guard in ("consumer_loads_it", "format_is_known") or row.fuse
        return
    there_and_back(src, tmp_path, **options)  # whatever is not in a group is as it was
    parts = {name for r in refused for name in r.parts}
    assert not parts.intersection(p.name for g in plan.groups for t in g.tensors for p in t.parts)
    if row.model == "llama":
        fused = {(g.group, g.layer) for g in plan.groups}
        whole = {("qkv", 0), ("qkv", 1), ("gate_up", 0), ("gate_up", 1)}
        assert fused == whole - {(row.group, layer) for layer in row.layers}


@pytest.mark.parametrize("row", cases(row for row in ROWS if row.harm))
def test_without_the_guard_harm_is_done(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = saved(row, tmp_path / "src")
    monkeypatch.setattr(guards, "GUARDS", tuple(g for n, g in GUARDS.items() if n != row.guard))
    assert harm_in(row, src, tmp_path / "dst") == row.harm


def harm_in(row: Row, src: Path, dst: Path) -> str | None:
    """The first harm that shows when `row` is converted."""
    try:
        plan = fuseweights.convert(src, dst, consumer=row.consumer, fuse=row.fuse, sync=False)
    except (AssertionError, KeyError, ValueError, IndexError, TypeError, struct.error):
        return "breaks"
    group = next(g for g in plan.groups if (g.group, g.layer) == (row.group, 0))
    try:
        fuseweights.open_checkpoint(dst)
        tensors_of(dst)
    except (CorruptError, Exception) as error:
        assert "deserializing" in str(error) or isinstance(error, CorruptError)
        return "unreadable"
    if row.consumer in engine_mapping.ENGINES:
        family = json.loads((dst / "config.json").read_text())["model_type"]
        family = family.removesuffix("_text")
        made = [engine_mapping.outcome(row.consumer, family, t.name) for t in group.tensors]
        return None if all(o.verdict == "loads" for o in made) else "engine"
    old, new = hf_formats.load(src), hf_formats.load(dst)
    parts = [part.name.rpartition(".")[0] for part in group.tensors[0].parts]
    if len(parts) != 3:
        return "shape"
    try:
        read = torch.cat([hf_formats.dequantize(row.fmt, old, part) for part in parts])
        fused = hf_formats.dequantize(row.fmt, new, module_of(group))
    except (RuntimeError, ValueError, IndexError):
        return "shape"
    if fused.shape != read.shape:
        return "shape"
    if not torch.equal(fused, read):
        return "numbers"
    bias = new.get(f"{module_of(group)}.bias")
    if bias is not None and len(bias) != len(fused):
        return "shape"
    once = [t for t in group.tensors if t.merge in ("same", "literal")]
    if any(len(t.parts) != 3 for t in once):
        return "kept"
    for tensor in once:
        kept = [old[part.name] for part in tensor.parts]
        if any(not torch.equal(kept[0], value) for value in kept) and "state" not in tensor.name:
            return "kept"
    states = [state(old, part) for part in parts]
    return "kept" if any(one != states[0] for one in states) else None


def state(found: Tensors, part: str) -> dict:
    """A bitsandbytes state but for the rows."""
    blobs = [v for k, v in found.items() if k.startswith(f"{part}.weight.quant_state.")]
    read = json.loads(bytes(blobs[0].tolist())) if blobs else {"shape": [0]}
    return {**read, "shape": read["shape"][1:]}


# --- what the matrix cannot say -----------------------------------------------------------------


def test_blocks_of_192_64_64_rows_are_misaligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The facts' own example: [256, 128, 72] is exact, [192, 64, 64] is not."""
    row = replace(
        hf_formats.FORMATS["fp8_block"], ragged={"heads": 3, "kv_heads": 1, "hidden": 192}
    )
    monkeypatch.setitem(hf_formats.FORMATS, "fp8_block", row)
    src = hf_formats.save("fp8_block", tmp_path / "src", ragged=True)
    (refusal, _) = fuseweights.plan(src).refusals
    assert refusal.reason == "misaligned-scale-block" and "q_proj has 192 rows" in refusal.detail
    kept = tuple(g for n, g in GUARDS.items() if n != "scales_stay_aligned")
    monkeypatch.setattr(guards, "GUARDS", kept)
    fuseweights.convert(src, tmp_path / "dst", sync=False)
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "dst")
    for fused, parts in hf_formats.groups().items():
        true = torch.cat([hf_formats.dequantize("fp8_block", old, part) for part in parts])
        read = hf_formats.dequantize("fp8_block", new, fused)
        assert torch.equal(true, read) == ("gate_up" in fused)


@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_block_bf16_scale", "ct_fp8_block"])
def test_only_the_last_part_may_end_within_a_block(fmt: str, tmp_path: Path) -> None:
    """And not for an engine that cuts the fused scales by whole blocks."""
    suffix = "weight_scale" if fmt.startswith("ct") else "weight_scale_inv"

    def cut(*parts: str) -> Edit:
        def change(found: Tensors) -> None:
            for part in parts:
                name = f"{LAYER}.mlp.{part}"
                found[f"{name}.weight"] = found[f"{name}.weight"][:300].clone()
                assert len(found[f"{name}.{suffix}"]) == 3

        return tensors(change)

    last = hf_formats.save(fmt, tmp_path / "last")
    cut("up_proj")(last)
    (tmp_path / "a").mkdir()
    assert not there_and_back(last, tmp_path / "a").refusals
    assert not fuseweights.plan(last, consumer="vllm").refusals
    (refusal,) = fuseweights.plan(last, consumer="sglang").refusals
    assert (refusal.reason, refusal.group) == ("misaligned-scale-block", "gate_up")
    old, new = hf_formats.load(last), hf_formats.load(tmp_path / "a/fused")
    parts = [f"{LAYER}.mlp.{part}" for part in ("gate_proj", "up_proj")]
    true = torch.cat([hf_formats.dequantize(fmt, old, part) for part in parts])
    assert torch.equal(hf_formats.dequantize(fmt, new, f"{LAYER}.mlp.gate_up_proj"), true)

    first = hf_formats.save(fmt, tmp_path / "first")
    cut("gate_proj", "up_proj")(first)
    (refusal,) = fuseweights.plan(first).refusals
    assert (refusal.reason, refusal.group) == ("misaligned-scale-block", "gate_up")


@pytest.mark.parametrize(
    "fmt, knob",
    [
        ("ct_nvfp4", "unequal"),
        ("ct_nvfp4", "unequal_input"),
        ("ct_nvfp4a16", "unequal"),
        ("modelopt_nvfp4", "unequal"),
        ("modelopt_nvfp4", "unequal_input"),
        ("gptq_desc_act", "g_idx_differs"),
        ("gptq_v2_desc_act", "g_idx_differs"),
    ],
)
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "up_proj"])
def test_one_unequal_value_leaves_one_group_split(
    fmt: str, knob: str, part: str, tmp_path: Path
) -> None:
    """Whichever part it is, in the second layer of three; the file has both kinds of layer."""
    src = hf_formats.save(fmt, tmp_path / "src", layers=3, layer=1, **{knob: part})
    plan = there_and_back(src, tmp_path)
    group = "gate_up" if part == "up_proj" else "qkv"
    assert [(r.group, r.layer) for r in plan.refusals] == [(group, 1)]
    assert len(plan.groups) == 5
    old, new = hf_formats.load(src), hf_formats.load(tmp_path / "fused")
    for layer in range(3):
        for fused, parts in hf_formats.groups(layer).items():
            split = layer == 1 and ("qkv" in fused) == (group == "qkv")
            read = [hf_formats.dequantize(fmt, new, name) for name in (parts if split else [fused])]
            true = [hf_formats.dequantize(fmt, old, name) for name in parts]
            assert torch.equal(torch.cat(read), torch.cat(true))


def test_one_different_global_scale_in_mxfp4_has_nothing_to_differ(tmp_path: Path) -> None:
    """MXFP4 has no global scale: nothing but its shapes and types can refuse it."""
    src = hf_formats.save("ct_mxfp4", tmp_path / "src")
    assert not there_and_back(src, tmp_path).refusals
    assert not any("global" in name for name in hf_formats.load(src))
