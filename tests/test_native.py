"""Families that are fused by themselves, taken apart by rule (`unfuse --as llama`)."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="needs fuseweights[torch]")
transformers = pytest.importorskip("transformers", reason="needs fuseweights[transformers]")

import hf_models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import RefusedError, UsageError  # noqa: E402

TOKENS = torch.tensor([[3, 17, 42, 5, 99, 7]])


def logits(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_phi3_becomes_a_llama_and_computes_the_same(tmp_path):
    src = hf_models.save("phi3", tmp_path / "phi3", dtype="float32")
    plan = fuseweights.unfuse(src, tmp_path / "llama", as_llama=True)
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert {part.name.split(".")[-2] for entry in plan.restored for part in entry.parts} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }
    torch.testing.assert_close(logits(tmp_path / "llama"), logits(src), rtol=1e-5, atol=1e-6)
    # and fusing it gives phi3's own tensors again
    fuseweights.convert(tmp_path / "llama", tmp_path / "again")
    ours, theirs = (
        load_file(tmp_path / "again/model.safetensors"),
        load_file(src / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "entry", [{"sliding_window": 64}, {"partial_rotary_factor": 0.75}], ids=lambda e: next(iter(e))
)
def test_a_phi3_that_llama_cannot_compute_keeps_its_configuration(tmp_path, entry):
    src = hf_models.save("phi3", tmp_path / "phi3")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, **entry}))
    plan = fuseweights.unfuse(src, tmp_path / "apart", as_llama=True)
    assert next(iter(entry)) in plan.inexact
    assert (tmp_path / "apart/config.json").read_text() == (src / "config.json").read_text()


def heads(rows, count):
    return rows.reshape(count, rows.shape[0] // count, *rows.shape[1:])


def thirds(config, rows):
    return rows.chunk(3, dim=0)


def per_head(config, rows):
    """[head, (q, k, v), width] as the modelling files of bloom and gpt_neox view it."""
    count = config.get("num_attention_heads") or config["n_head"]
    view = heads(rows, count).unflatten(1, (3, -1))
    return tuple(view[:, i].flatten(0, 1) for i in range(3))


def falcon(config, rows):
    """FalconAttention._split_heads, written out."""
    count, width = (
        config["num_attention_heads"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    if config["new_decoder_architecture"]:
        groups = config["num_kv_heads"]
        view = rows.reshape(groups, count // groups + 2, width, *rows.shape[1:])
        return view[:, :-2].flatten(0, 2), view[:, -2].flatten(0, 1), view[:, -1].flatten(0, 1)
    if config["multi_query"]:
        return rows.split([count * width, width, width])
    return per_head(config, rows)


FUSED = {
    "gpt2": ("c_attn", thirds),
    "baichuan": ("W_pack", thirds),
    "falcon": ("query_key_value", falcon),
    "bloom": ("query_key_value", per_head),
    "gpt_neox": ("query_key_value", per_head),
}


@pytest.mark.parametrize("family", FUSED)
def test_parts_are_what_the_modelling_file_takes(tmp_path, family):
    src = hf_models.save(family, tmp_path / "src")
    fuseweights.unfuse(src, tmp_path / "apart", as_llama=True)
    fused, apart = (
        load_file(src / "model.safetensors"),
        load_file(tmp_path / "apart/model.safetensors"),
    )
    config = json.loads((src / "config.json").read_text())
    name, split = FUSED[family]
    found = 0
    for key, tensor in fused.items():
        if f".{name}." not in key:
            assert torch.equal(apart[key], tensor)
            continue
        found += 1
        transposed = family == "gpt2" and tensor.ndim == 2  # Conv1D keeps [in, out]
        parts = split(config, tensor.T if transposed else tensor)
        for part, rows in zip("qkv", parts, strict=True):
            rows = rows.T if transposed else rows
            assert torch.equal(apart[key.replace(name, f"{part}_proj")], rows)
    assert found >= 2


@pytest.mark.parametrize(
    "settings",
    [
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
    ids=["multi_query", "per_head", "grouped"],
)
def test_every_falcon(tmp_path, settings):
    config = transformers.FalconConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64, **settings
    )
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "src")
    fuseweights.unfuse(tmp_path / "src", tmp_path / "apart", as_llama=True)
    fused = load_file(tmp_path / "src/model.safetensors")
    apart = load_file(tmp_path / "apart/model.safetensors")
    key = "transformer.h.0.self_attention.query_key_value.weight"
    saved = json.loads((tmp_path / "src/config.json").read_text())
    for part, rows in zip("qkv", falcon(saved, fused[key]), strict=True):
        assert torch.equal(apart[key.replace("query_key_value", f"{part}_proj")], rows)


def test_qwen3_next_comes_apart_as_its_own_code_takes_it(tmp_path):
    """in_proj_qkvz and in_proj_ba are interleaved per key head; the parts are Qwen3.5's."""
    src = hf_models.save("qwen3_next", tmp_path / "src", dtype="float32")
    fuseweights.unfuse(src, tmp_path / "apart", as_llama=True)
    apart = load_file(tmp_path / "apart/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    mixer = model.model.layers[0].linear_attn
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    q, k, v, z, b, a = mixer.fix_query_key_value_ordering(
        mixer.in_proj_qkvz(x), mixer.in_proj_ba(x)
    )
    prefix = "model.layers.0.linear_attn.in_proj_"
    for part, want in {
        "qkv": torch.cat([t.flatten(2) for t in (q, k, v)], -1),
        "z": z.flatten(2),
        "b": b.flatten(2),
        "a": a.flatten(2),
    }.items():
        torch.testing.assert_close(x @ apart[f"{prefix}{part}.weight"].T, want)


def test_refused(tmp_path):
    llama = hf_models.save("llama", tmp_path / "llama")
    with pytest.raises(RefusedError, match="stores nothing fused by itself"):
        fuseweights.unfuse(llama, tmp_path / "a", as_llama=True)
    fuseweights.convert(llama, tmp_path / "fused")
    with pytest.raises(UsageError, match="was fused by fuseweights"):
        fuseweights.unfuse(tmp_path / "fused", tmp_path / "b", as_llama=True)
    src = hf_models.save("phi3", tmp_path / "phi3")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    plan = fuseweights.unfuse(src, tmp_path / "c", as_llama=True)
    assert [(r.group, r.reason) for r in plan.refusals] == [("qkv", "unknown-sizes")] * 2
    assert json.loads((tmp_path / "c/config.json").read_text())["model_type"] == "phi3"
