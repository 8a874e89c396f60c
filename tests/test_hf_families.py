"""Every family of Hugging Face checkpoints: what fuses, what is refused, and the way back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_formats  # noqa: E402
import hf_models  # noqa: E402
from raw_safetensors import INDEX, layer, there_and_back, write  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import RefusedError  # noqa: E402

MISSING = ("qkv", "missing-part")
NO_BIAS = ("qkv", "bias-mismatch")
DENSE = {"qkv": 2, "gate_up": 2}
MLA = {"qkv_a": 2, "gate_up": 1, "experts": 1, "shared_gate_up": 1}
MIXER = {"qkv": 1, "gdn_in_proj": 1}

#: family: groups that fuse for torch, and the refusals. Two layers each where nothing is said.
EXPECTED: dict[str, tuple[dict[str, int], list[tuple[str, str]]]] = {
    **{
        family: (DENSE, [])
        for family in (
            "llama", "llama_bias", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2",
            "gemma3_text", "granite", "olmo2", "olmo3", "smollm3", "cohere2", "internlm3",
            "qwen3_vl",
        )
    },
    "gemma3": ({"qkv": 4, "gate_up": 2}, []),  # a vision tower with attention of its own
    "qwen2_5_vl": ({"qkv": 2, "gate_up": 3}, []),  # one with a gated MLP, and biases
    "siglip": ({"qkv": 4}, []),  # a text and a vision tower
    "bert": ({"qkv": 2}, []),
    "roberta": ({"qkv": 2}, []),
    "vit": ({"qkv": 2}, []),
    "glm4": ({"qkv": 2}, []),  # gate_up is its own
    "gpt_oss": ({"qkv": 2}, []),  # experts are its own, interleaved
    "starcoder2": ({"qkv": 2}, []),
    "internlm2": ({"gate_up": 2}, []),  # wqkv is its own
    "baichuan": ({"gate_up": 2}, []),  # W_pack is its own
    # the first layer is dense, or the other way round
    "glm4_moe": ({"qkv": 2, "gate_up": 1, "experts": 1, "shared_gate_up": 1}, []),
    "llama4_text": ({"qkv": 2, "gate_up": 1, "shared_gate_up": 1}, []),
    "llama4": ({"qkv": 4, "gate_up": 1, "shared_gate_up": 1}, []),
    "qwen3_moe": ({"qkv": 2, "experts": 2}, []),
    "qwen2_moe": ({"qkv": 2, "experts": 2, "shared_gate_up": 2}, []),
    "mixtral": ({"qkv": 2, "experts": 2}, []),
    "minimax_m2": ({"qkv": 2, "experts": 2}, []),
    # one Gated DeltaNet layer, one of attention
    "qwen3_next": ({"qkv": 1, "experts": 2, "shared_gate_up": 2}, []),
    "qwen3_5_text": (MIXER | {"gate_up": 2}, []),
    "qwen3_5": (MIXER | {"gate_up": 2}, []),
    "qwen3_5_mtp": (MIXER | {"qkv": 2, "gate_up": 3}, []),
    "qwen3_5_moe_text": (MIXER | {"experts": 2, "shared_gate_up": 2}, []),
    "qwen3_5_moe": (MIXER | {"experts": 2, "shared_gate_up": 2}, []),
    # layers that share another's keys and values, or have values that are the keys
    "gemma3n_text": ({"qkv": 2, "gate_up": 4}, [MISSING] * 2),
    "gemma4_text": ({"qkv": 2, "gate_up": 4}, [MISSING] * 2),
    "gemma4_k_eq_v": ({"qkv": 1, "gate_up": 2}, [MISSING]),
    # each projection of the vision tower clips its own input
    "gemma4": (DENSE, [("qkv", "format-unsupported"), ("gate_up", "format-unsupported")]),
    "deepseek_v2": (MLA, []),
    "deepseek_v2_lite": ({"gate_up": 1, "experts": 1, "shared_gate_up": 1}, []),  # no q_a_proj
    "deepseek_v3": (MLA, []),
    "deepseek_v3_mtp": (MLA | {"qkv_a": 3, "experts": 2, "shared_gate_up": 2}, []),
    "kimi_k2": (MLA, []),
    # k never has a bias: self-attention of encoder and decoder, and cross-attention
    "whisper": ({}, [NO_BIAS] * 3),
    # fused by themselves
    **{family: ({}, []) for family in ("phi3", "gpt2", "falcon", "gpt_neox", "bloom")},
}  # fmt: skip

#: The order of the facts: fused module, below its parent, and its parts.
ORDER = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.self.qkv_proj": tuple(f"attention.self.{p}" for p in ("query", "key", "value")),
    "attention.attention.qkv_proj": tuple(
        f"attention.attention.{p}" for p in ("query", "key", "value")
    ),
    "self_attn.fused_qkv_a_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "linear_attn.in_proj": tuple(f"linear_attn.in_proj_{p}" for p in ("qkv", "z", "b", "a")),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_expert.gate_up_proj": tuple(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up")),
    "mlp.shared_experts.gate_up_proj": tuple(
        f"mlp.shared_experts.{p}_proj" for p in ("gate", "up")
    ),
    "feed_forward.gate_up_proj": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "feed_forward.shared_expert.gate_up_proj": tuple(
        f"feed_forward.shared_expert.{p}_proj" for p in ("gate", "up")
    ),
}
INTERNLM2 = {"feed_forward.gate_up_proj": ("feed_forward.w1", "feed_forward.w3")}
EXPERTS = {
    "mixtral": "block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3",
    "minimax_m2": "block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3",
}
STACKED = "mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_family_has_a_row():
    assert EXPECTED.keys() == hf_models.FAMILIES.keys()


@pytest.mark.parametrize("shard", [None, 12_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", EXPECTED)
def test_family_there_and_back(tmp_path: Path, family: str, shard: int | None) -> None:
    groups, refusals = EXPECTED[family]
    src = hf_models.save(family, tmp_path / "src", max_shard_size=shard)
    (src / "tokenizer.json").write_text('{"version": "1.0"}')
    assert (src / INDEX).exists() == bool(shard)
    if not groups:
        with pytest.raises(RefusedError, match="nothing to fuse") as caught:
            fuseweights.convert(src, tmp_path / "fused", sync=False)
        found = caught.value.refusals
    else:
        plan = there_and_back(src, tmp_path)
        found = plan.refusals
        assert Counter(group.group for group in plan.groups) == groups
        check_the_stacks(family, src, tmp_path / "fused")
        apart = [g for g in plan.groups if len({p.file for p in g.tensors[0].parts}) > 1]
        assert bool(apart) == bool(shard)
    assert sorted((r.group, r.reason) for r in found) == sorted(refusals)


def check_the_stacks(family: str, src: Path, fused: Path) -> None:
    """By torch, from the order that the facts give and not from the plan."""
    old, new = hf_formats.load(src), hf_formats.load(fused)
    order = INTERNLM2 if family == "internlm2" else ORDER
    names = EXPERTS.get(family, "mlp.experts.{}.gate_proj mlp.experts.{}.up_proj").split()
    made = new.keys() - old.keys()
    for name in made:
        if name.endswith(STACKED):
            parent, whole = name.removesuffix(STACKED), []
            for number in range(4):
                parts = [f"{parent}{part.format(number)}.weight" for part in names]
                whole.append(torch.cat([old.pop(part) for part in parts]))
            assert torch.equal(new[name], torch.stack(whole))
            continue
        module, _, suffix = name.rpartition(".")
        below = next(below for below in order if module.endswith(f".{below}"))
        parent = module.removesuffix(below)
        parts = [old.pop(f"{parent}{part}.{suffix}") for part in order[below]]
        assert torch.equal(new[name], torch.cat(parts))
    assert old.keys() == new.keys() - made
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "qwen3_5", "bert", "kimi_k2"])
def test_a_file_a_tensor(tmp_path: Path, family: str) -> None:
    """Parts never share a file; the files that they leave empty are gone and come back."""
    src = hf_models.save(family, tmp_path / "src", max_shard_size=1)
    plan = there_and_back(src, tmp_path)
    count = len(hf_formats.load(src))
    assert len(list(src.glob("*.safetensors"))) == count == len(plan.checkpoint.files)
    moved = sum(len(t.parts) - 1 for g in plan.groups for t in g.tensors)
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) == count - moved
    where = json.loads((src / INDEX).read_text())["weight_map"]
    now = json.loads((tmp_path / "fused" / INDEX).read_text())["weight_map"]
    for group in plan.groups:
        for tensor in group.tensors:  # where its first part lay
            assert now[tensor.name] == where[tensor.parts[0].name]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe"])
def test_experts_that_are_stacked_already_are_left_alone(tmp_path: Path, family: str) -> None:
    src = hf_models.save(family, tmp_path / "src", original_format=False)
    plan = there_and_back(src, tmp_path)
    groups = {k: v for k, v in EXPECTED[family][0].items() if k != "experts"}
    assert Counter(group.group for group in plan.groups) == groups and not plan.refusals


# --- names --------------------------------------------------------------------------------------

#: Names that hold a part's name, and are none.
TRAPS = {
    "llama": """
        self_attn.qkv_proj self_attn.q_proj_norm self_attn.q_proj_extra self_attn.xq_proj
        myself_attn.q_proj self_attn.k_norm self_attn.v_proj2 mlp.gate_up_proj mlp.gate
        mlp.shared_up_proj mlp.up_projection xmlp.up_proj self_attn.inner.v_proj
        self_attn.o_proj mlp.down_proj
    """,
    "qwen3_5": """
        linear_attn.in_proj_qkvz linear_attn.in_proj_ba linear_attn.in_proj_bb
        linear_attn.in_proj_qkvzz linear_attn.in_proj linear_attn.xin_proj_a in_proj_b
    """,
    "qwen2_moe": """
        mlp.experts.gate_up_proj mlp.experts.x.gate_proj mlp.experts.01.up_proj
        mlp.experts.+1.up_proj mlp.experts.1.up_proj_2 mlp.shared_expert_gate mlp.gate
        mlp.experts.１.up_proj mlp.experts..up_proj mlp.shared_expert.gate_up_proj
    """,
    "deepseek_v3": """
        self_attn.fused_qkv_a_proj self_attn.kv_a_proj self_attn.q_a_layernorm
        self_attn.kv_a_proj_with_mqa_2 self_attn.xkv_a_proj_with_mqa
    """,
    "mixtral": "block_sparse_moe.experts.0.w11 block_sparse_moe.w1 block_sparse_moe.gate",
}


@pytest.mark.parametrize("family, traps", TRAPS.items())
def test_segments_match_whole(tmp_path: Path, family: str, traps: str) -> None:
    names = [f"model.layers.0.{name}.weight" for name in traps.split()]
    names += ["self_attn.q_proj_.weight", "q_proj.weight", "mlp.weight", "", "..", "."]
    tensors = [(name, "BF16", (4, 4), None) for name in names]
    src = write(tmp_path / "src", tensors, config={"model_type": family})
    plan = fuseweights.plan(src)
    assert not plan.groups and not plan.refusals and plan.copied == len(names)


def test_real_parts_beside_traps_fuse(tmp_path: Path) -> None:
    traps = [
        n for n in TRAPS["llama"].split() if n.rpartition(".")[2] not in ("o_proj", "down_proj")
    ]
    traps = [name for name in traps if name not in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    tensors = [(f"model.layers.0.{name}.weight", "BF16", (4, 4), None) for name in traps]
    src = write(tmp_path / "src", [*tensors, *layer(0), *layer(1)])
    plan = there_and_back(src, tmp_path)
    assert Counter(group.group for group in plan.groups) == DENSE and not plan.refusals


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.model.", "model.language_model.", "a.b.c.d.", "mtp."]
)
def test_any_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = [
        (name.replace("model.", prefix, 1), dtype, shape, raw)
        for name, dtype, shape, raw in layer(7)
    ]
    plan = there_and_back(write(tmp_path / "src", tensors), tmp_path)
    assert [group.tensors[0].name for group in plan.groups] == [
        f"{prefix}layers.7.self_attn.qkv_proj.weight",
        f"{prefix}layers.7.mlp.gate_up_proj.weight",
    ]
    assert {group.layer for group in plan.groups} == {7}


def test_an_expert_that_is_missing_refuses_all(tmp_path: Path) -> None:
    """A gap, an end without its partner, or a number that would make a long list."""

    def experts(*numbers: tuple[int, str]) -> list:
        return [
            (f"model.layers.0.mlp.experts.{n}.{part}_proj.weight", "BF16", (4, 8), None)
            for n, part in numbers
        ]

    whole = [(n, part) for n in range(3) for part in ("gate", "up")]
    config = {"model_type": "qwen3_moe"}
    fine = write(tmp_path / "fine", experts(*whole), config=config)
    assert [group.group for group in fuseweights.plan(fine).groups] == ["experts"]
    for number, numbers in enumerate(
        [whole[:2] + whole[4:], whole[:-1], whole[2:], [*whole, (10**8, "gate")]]
    ):
        src = write(tmp_path / str(number), experts(*numbers), config=config)
        plan = fuseweights.plan(src)
        assert [(r.group, r.reason) for r in plan.refusals] == [("experts", "missing-part")]


# --- transformers -------------------------------------------------------------------------------

STOCK = """
import sys
from transformers import AutoModelForCausalLM
assert "fuseweights" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("LOADED")
except ValueError as error:
    print("RAISED", error)
_, info = AutoModelForCausalLM.from_pretrained(sys.argv[2], output_loading_info=True)
print("MISSING", len(info["missing_keys"]))
"""


def test_stock_transformers_raises_where_it_would_make_up_weights(tmp_path: Path) -> None:
    """In a process that never imports fuseweights; without our key it loads random weights."""
    src = hf_models.save("llama", tmp_path / "src")
    fuseweights.convert(src, tmp_path / "fused", sync=False)
    fuseweights.convert(src, tmp_path / "keyless", sync=False)
    config = json.loads((tmp_path / "keyless" / "config.json").read_text())
    assert config.pop("fusion_config") == {"fuseweights": True}
    assert config == json.loads((src / "config.json").read_text())
    (tmp_path / "keyless" / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        STOCK,
        tmp_path / "fused",
        tmp_path / "keyless",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert re.search("RAISED Unknown fusion type.*fuseweights", done.stdout), done.stdout
    assert re.search("MISSING 10$", done.stdout.strip()), done.stdout


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe_text"])
def test_stacked_experts_are_what_transformers_itself_uses(tmp_path: Path, family: str) -> None:
    """It stacks experts as it loads; a directory in which they are stacked gives the same model."""
    from transformers import AutoModelForCausalLM

    src = hf_models.save(family, tmp_path / "src")
    fuseweights.convert(src, tmp_path / "fused", fuse=["experts"], sync=False)
    (tmp_path / "fused" / "config.json").write_bytes((src / "config.json").read_bytes())
    ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(info.values()), info
    theirs = AutoModelForCausalLM.from_pretrained(src).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.state_dict().items())
