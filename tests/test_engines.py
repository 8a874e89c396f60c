"""What is written for vLLM and SGLang is what their loaders load, by a simulation of those.

`engine_mapping` follows the name substitution in each engine's `load_weights`. The allowlist of
the package must agree with it group by group; a key that the engine would fail on, drop without a
word or misread is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import engine_mapping  # noqa: E402
import hf_models  # noqa: E402
from raw_safetensors import there_and_back  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import guards  # noqa: E402
from fuseweights.rules import consumers, engines  # noqa: E402
from fuseweights.rules.groups import GROUPS, Loads  # noqa: E402

#: Checkpoints with more than their family's row speaks of.
ROW = {
    "qwen3_5_mtp": "qwen3_5",
    "deepseek_v3_mtp": "deepseek_v3",
    "deepseek_v2_lite": "deepseek_v2",
}
FAMILIES = [
    (engine, family)
    for engine, rows in engine_mapping.ENGINES.items()
    for family in hf_models.FAMILIES
    if ROW.get(family, family) in rows
]
ABSENT = [
    (engine, family)
    for engine in engine_mapping.ENGINES
    for family in hf_models.FAMILIES
    if (engine, family) not in FAMILIES
]
#: Loaded, and refused all the same.
CAUTIOUS = {
    # once SGLang has seen stacked experts it looks for a stacked down_proj only
    ("sglang", "experts"),
}
#: Prefixes of what is not the text model's own layer: nothing is said of these.
ELSEWHERE = ("vision_tower.", "visual.", "model.visual.", "mtp.")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Each family once."""
    root = tmp_path_factory.mktemp("families")

    def save(family: str) -> Path:
        known = (root / family).exists()
        return root / family if known else hf_models.save(family, root / family)

    return save


def verdicts(engine: str, family: str, group: fuseweights.Group) -> set[str]:
    row = ROW.get(family, family)
    return {engine_mapping.outcome(engine, row, t.name).verdict for t in group.tensors}


@pytest.mark.parametrize("engine, family", FAMILIES)
def test_the_allowlist_agrees_with_the_engine(saved, engine: str, family: str) -> None:
    src = saved(family)
    model_type = json.loads((src / "config.json").read_text())["model_type"]
    layers = hf_models.LAYERS
    for group in GROUPS:
        possible = fuseweights.plan(src, consumer="torch", fuse=[group]).groups
        ours = fuseweights.plan(src, consumer=engine, fuse=[group])
        done = {g.tensors[0].name for g in ours.groups}
        assert done <= {g.tensors[0].name for g in possible}
        refused = {r.layer: r for r in ours.refusals}
        for found in possible:
            name = found.tensors[0].name
            draft = "mtp" in family and (name.startswith("mtp.") or (found.layer or 0) >= layers)
            loads = verdicts(engine, family, found) == {"loads"}
            if name.startswith(ELSEWHERE) or draft or (engine, group) in CAUTIOUS:
                loads = False
            assert (name in done) == loads, (name, verdicts(engine, family, found))
            if not loads:
                assert refused[found.layer].reason == "consumer-unsupported"
            if not (name.startswith(ELSEWHERE) or draft):
                row = consumers.loads(engine, "safetensors", model_type, group)
                assert isinstance(row, Loads) == loads


@pytest.mark.parametrize("engine, family", ABSENT)
def test_a_family_that_the_engine_lacks_is_left_alone(saved, engine: str, family: str) -> None:
    assert not fuseweights.plan(saved(family), consumer=engine).groups


@pytest.mark.parametrize("engine, family", FAMILIES)
def test_every_fused_key_that_is_written_loads_whole(
    saved, tmp_path: Path, engine: str, family: str
) -> None:
    plan = fuseweights.plan(saved(family), consumer=engine)
    if not plan.groups:
        return
    plan = there_and_back(saved(family), tmp_path, consumer=engine)
    for group in plan.groups:
        for tensor in group.tensors:
            outcome = engine_mapping.outcome(engine, ROW.get(family, family), tensor.name)
            assert (outcome.verdict, outcome.shard) == ("loads", None)


def test_every_row_of_the_allowlist_is_a_family() -> None:
    """No row that no test reaches."""
    types = set()
    for family, row in hf_models.FAMILIES.items():
        types |= {family, getattr(row, "model_type", family)}
    types |= {"gemma3n", "gemma4", "qwen2_5_vl", "qwen3_vl"}  # a vision-language model's own type
    for groups in engines.LOADED.values():
        for named in groups.values():
            assert named <= types
    for _, group, family in engines.MISREAD:
        assert group in GROUPS and family in types


#: (engine, family, group): what becomes of the fused key, as the facts have it.
HARM = {
    ("vllm", "qwen3_5", "gdn_qkvz"): "raises",
    ("vllm", "qwen3_5", "gdn_ba"): "raises",
    ("vllm", "qwen3_5_moe", "gdn_qkvz"): "raises",
    ("vllm", "deepseek_v3", "gate_up"): "raises",
    ("vllm", "deepseek_v3", "shared_gate_up"): "raises",
    ("vllm", "deepseek_v3", "experts"): "raises",
    ("vllm", "deepseek_v2_lite", "gate_up"): "raises",
    ("vllm", "llama4", "qkv"): "wrong",
    ("vllm", "llama4_text", "qkv"): "wrong",
    ("vllm", "mixtral", "experts"): "dropped",
    ("vllm", "minimax_m2", "experts"): "dropped",
    ("vllm", "olmo2", "qkv"): "unknown",
    ("vllm", "smollm3", "gate_up"): "unknown",
    ("vllm", "starcoder2", "qkv"): "unknown",
    ("sglang", "qwen2", "qkv"): "dropped",
    ("sglang", "qwen2", "gate_up"): "dropped",
    ("sglang", "qwen3", "qkv"): "raises",
    ("sglang", "qwen3", "gate_up"): "raises",
    ("sglang", "gemma2", "qkv"): "raises",
    ("sglang", "gemma3_text", "gate_up"): "raises",
    ("sglang", "olmo2", "qkv"): "raises",
    ("sglang", "cohere2", "gate_up"): "raises",
    ("sglang", "starcoder2", "qkv"): "raises",
    ("sglang", "baichuan", "gate_up"): "raises",
    ("sglang", "mixtral", "qkv"): "raises",
    ("sglang", "qwen3_5", "qkv"): "dropped",
    ("sglang", "qwen3_5", "gate_up"): "dropped",
    ("sglang", "qwen3_moe", "qkv"): "dropped",
    ("sglang", "qwen3_moe", "experts"): "dropped",
    ("sglang", "qwen3_next", "experts"): "raises",
    ("sglang", "minimax_m2", "qkv"): "dropped",
    ("sglang", "gpt_oss", "qkv"): "dropped",
    ("sglang", "glm4_moe", "shared_gate_up"): "dropped",
    ("sglang", "deepseek_v3", "qkv_a"): "dropped",
    ("sglang", "kimi_k2", "qkv_a"): "dropped",
    ("sglang", "llama4", "qkv"): "wrong",
    ("sglang", "qwen2_5_vl", "gate_up"): "raises",
    ("sglang", "qwen3_vl", "gate_up"): "dropped",
}


@pytest.mark.parametrize("engine, family, group", HARM)
def test_without_the_guard_the_engine_fails_drops_or_misreads(
    saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, family: str, group: str
) -> None:
    src = saved(family)
    plan = fuseweights.plan(src, consumer=engine, fuse=[group])
    assert not plan.groups
    assert {r.reason for r in plan.refusals} == {"consumer-unsupported"}
    kept = tuple(g for g in guards.GUARDS if g is not guards.consumer_loads_it)
    monkeypatch.setattr(guards, "GUARDS", kept)
    done = fuseweights.convert(src, tmp_path / "fused", consumer=engine, fuse=[group], sync=False)
    assert done.groups
    row, weights = ROW.get(family, family), [g.tensors[0].name for g in done.groups]
    found = {engine_mapping.outcome(engine, row, name).verdict for name in weights}
    assert found == {HARM[engine, family, group]}
