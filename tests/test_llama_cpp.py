"""Stock llama.cpp loads what is fused for it, and computes the very same numbers.

Every run is a process of its own: a crash is a result. Log-probabilities of the whole vocabulary
are compared, not only tokens: several architectures hide a wrong k behind a norm.
"""

from __future__ import annotations

import hashlib

import gguf_models
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from llama_cpp import LoadFailed, run

import fuseweights
from fuseweights import guards
from fuseweights.rules import gguf
from fuseweights.rules.groups import Rule

PROMPT = [5, 17, 101, 42, 7]
MIXES = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "Q4_K_M")
# architecture: groups that must fuse for llama.cpp
ARCHITECTURES = {
    "llama": {"qkv"},
    "qwen2": {"qkv"},
    "qwen3": {"qkv"},
    "qwen3moe": {"qkv"},
    "gemma3": {"qkv"},
    "gemma4": {"qkv"},
    "gemma4-shared": {"qkv"},
    "gemma4-moe": {"qkv", "experts"},
    "qwen35": {"qkv"},
    "qwen35moe": {"qkv", "experts"},
    "qwen3next": {"qkv", "experts"},
    "deepseek2": {"experts"},
}
QUICK = {("llama", mix) for mix in MIXES} | {
    (architecture, "Q4_K_M") for architecture in ("qwen2", "gemma4-moe", "qwen35moe", "deepseek2")
}
MATRIX = [
    pytest.param(
        architecture,
        mix,
        marks=() if (architecture, mix) in QUICK else pytest.mark.slow,
    )
    for architecture in ARCHITECTURES
    for mix in MIXES
]


@pytest.mark.parametrize("architecture, mix", MATRIX)
def test_same_numbers_and_the_way_back(tmp_path, architecture, mix):
    src = gguf_models.build(architecture, tmp_path / "a.gguf", mix)
    fused, back = tmp_path / "b.gguf", tmp_path / "c.gguf"
    plan = fuseweights.convert(src, fused)
    assert {group.group for group in plan.groups} == ARCHITECTURES[architecture]
    assert fuseweights.verify(src, fused, values=True).ok
    assert run(fused, PROMPT) == run(src, PROMPT)
    fuseweights.unfuse(fused, back)
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (src, back)]
    assert sums[0] == sums[1]
    assert fuseweights.verify_source_sha256(fused, sums[0]).ok


def test_a_run_repeats_itself_and_notices_a_swapped_section(tmp_path, monkeypatch):
    """Control: the comparison above can fail. k and v exchanged load without a word."""
    src = gguf_models.build("llama", tmp_path / "a.gguf", "Q8_0")
    assert run(src, PROMPT) == run(src, PROMPT)
    swapped = (Rule("qkv", ("attn_q", "attn_v", "attn_k"), "attn_qkv"),)
    monkeypatch.setattr(gguf, "RULES", swapped)
    fuseweights.convert(src, tmp_path / "b.gguf")
    monkeypatch.undo()
    assert run(tmp_path / "b.gguf", PROMPT) != run(src, PROMPT)
    assert not fuseweights.verify(src, tmp_path / "b.gguf").ok


# architecture, group: what the guard `consumer_loads_it` keeps from happening
REJECTED = [("qwen3moe", "experts"), ("llama", "gate_up"), ("qwen4exp", "qkv")]


@pytest.mark.parametrize("architecture, group", REJECTED)
def test_what_is_refused_would_not_load(tmp_path, monkeypatch, architecture, group):
    src = gguf_models.build(architecture, tmp_path / "a.gguf", "Q8_0")
    assert run(src, PROMPT, 1).tokens
    assert {r.reason for r in fuseweights.plan(src, fuse=[group]).refusals} == {
        "consumer-unsupported"
    }
    others = tuple(g for g in guards.GUARDS if g is not guards.consumer_loads_it)
    monkeypatch.setattr(guards, "GUARDS", others)
    fuseweights.convert(src, tmp_path / "b.gguf", fuse=[group])
    with pytest.raises(LoadFailed):
        run(tmp_path / "b.gguf", PROMPT, 1)


def test_scales_of_fused_experts_are_refused_because_never_loaded(tmp_path, monkeypatch):
    src = gguf_models.build("qwen35moe", tmp_path / "plain.gguf", "NVFP4")
    scales = [(f"blk.0.ffn_{part}_exps.scale", 3.0) for part in ("gate", "up")]
    src = _with(src, tmp_path / "a.gguf", scales)
    (refusal,) = [r for r in fuseweights.plan(src, fuse=["experts"]).refusals if r.layer == 0]
    assert refusal.reason == "consumer-unsupported" and "never loads" in refusal.detail
    others = tuple(g for g in guards.GUARDS if g is not guards.companions_are_known)
    monkeypatch.setattr(guards, "GUARDS", others)
    fuseweights.convert(src, tmp_path / "b.gguf", fuse=["experts"])
    try:
        assert run(tmp_path / "b.gguf", PROMPT) != run(src, PROMPT)
    except LoadFailed as error:
        assert "wrong number of tensors" in str(error)


def test_unequal_nvfp4_scales_stay_apart_and_equal_ones_fuse(tmp_path):
    plain = gguf_models.build("llama", tmp_path / "plain.gguf", "NVFP4")
    equal = [(f"blk.{n}.attn_{p}.scale", 0.5) for n in (0, 1) for p in "qkv"]
    unequal = [(name, 0.25 if name == "blk.0.attn_v.scale" else 0.5) for name, _ in equal]
    for scales, layers in ((equal, [0, 1]), (unequal, [1])):
        src = _with(plain, tmp_path / "a.gguf", scales)
        plan = fuseweights.convert(src, tmp_path / "b.gguf", overwrite=True)
        assert [group.layer for group in plan.groups] == layers
        assert run(tmp_path / "b.gguf", PROMPT) == run(src, PROMPT)
    assert run(_with(plain, tmp_path / "d.gguf", equal), PROMPT) != run(src, PROMPT)


def _with(src, dst, scales):
    """A copy of `src` with these F32 scales: (name, value), one an expert or one in all."""
    reader = GGUFReader(src)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(dst, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, inner)
    rows = {t.name: t.shape for t in reader.tensors}
    replaced = {name for name, _ in scales}
    for tensor in (t for t in reader.tensors if t.name not in replaced):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in scales:
        shape = rows[name.replace(".scale", ".weight")]
        writer.add_tensor(name, np.full(shape[2] if len(shape) == 3 else 1, value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def test_split_set_runs(tmp_path):
    src = gguf_models.build("qwen3", tmp_path / "whole.gguf", "Q4_K_M")
    first = _split(src, tmp_path, 3)
    fuseweights.convert(first, tmp_path / "fused.gguf")
    assert run(tmp_path / "fused-00001-of-00003.gguf", PROMPT) == run(src, PROMPT)


def _split(src, directory, count):
    """`src` as a split set, by gguf's own writer."""
    from gguf import GGUFValueType

    reader = GGUFReader(src)
    tensors = np.array_split(np.arange(len(reader.tensors)), count)
    for number, rows in enumerate(tensors):
        name = f"apart-{number + 1:05d}-of-{count:05d}.gguf"
        writer = GGUFWriter(directory / name, reader.fields["general.architecture"].contents())
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        writer.add_key_value("split.no", number, GGUFValueType.UINT16)
        writer.add_key_value("split.count", count, GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", len(reader.tensors), GGUFValueType.INT32)
        for i in rows:
            tensor = reader.tensors[i]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return directory / f"apart-00001-of-{count:05d}.gguf"


@pytest.mark.parametrize("architecture", ["qwen2", "gemma4-moe", "qwen35moe", "deepseek2"])
def test_fused_by_another_tool(tmp_path, architecture):
    """The same file without a manifest, as llama.cpp's own converter would have made it."""
    src = gguf_models.build(architecture, tmp_path / "a.gguf", "Q4_0")
    ours, theirs, back = (tmp_path / name for name in ("b.gguf", "theirs.gguf", "back.gguf"))
    plan = fuseweights.convert(src, ours)
    reader = GGUFReader(ours)
    assert "fuseweights.manifest" in reader.fields
    _without_manifest(reader, theirs)
    assert fuseweights.verify(src, theirs).ok
    found = fuseweights.inspect(theirs)
    assert len(found.fused) == len(plan.groups) and found.fused_for is None
    fuseweights.unfuse(theirs, back)
    assert fuseweights.verify(src, back).ok
    assert run(back, PROMPT) == run(src, PROMPT)


def _without_manifest(reader, dst):
    writer = GGUFWriter(dst, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "fuseweights.")) or key == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
