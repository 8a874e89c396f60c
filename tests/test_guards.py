"""Each guard fires with its code and leaves the group as it was; without it, harm is done."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from raw_gguf import ARRAY, BOOL, STRING, layer, write

import fuseweights
from fuseweights import CorruptError, FuseweightsError, RefusedError, guards


def without(name: str, shape=(4, 64), dtype="Q8_0"):
    """A layer in which one tensor has another shape or type, or is absent when shape is None."""
    rows = [t for t in layer(0) if t[0] != f"blk.0.{name}"]
    return rows if shape is None else [*rows, (f"blk.0.{name}", shape, dtype, None)]


def scaled(q: float, k: float, v: float, suffix: str = "scale") -> list:
    """NVFP4 attention with its per-tensor sidecars."""
    scales = zip("qkv", (q, k, v), strict=True)
    return layer(0, dtype="NVFP4") + [
        (f"blk.0.attn_{part}.{suffix}", (1,), "F32", np.float32(scale).tobytes())
        for part, scale in scales
    ]


def noted(flags: list[tuple[str, bool]]) -> list:
    return [
        (
            "general.tensor_extra.name",
            ARRAY,
            (STRING, [f"blk.0.attn_{p}.weight" for p, _ in flags]),
        ),
        ("general.tensor_extra.prec_a4", ARRAY, (BOOL, [flag for _, flag in flags])),
    ]


EXPERT_SCALES = [
    (f"blk.0.ffn_{part}_exps.{suffix}", shape, dtype, bytes(8) if dtype == "F32" else None)
    for part in ("gate", "up")
    for suffix, shape, dtype in (("weight", (2, 4, 64), "NVFP4"), ("scale", (2,), "F32"))
]

# guard: (reason, sentence, tensors, keyword arguments of the file)
CASES = {
    "consumer_loads_it": [
        ("unknown-architecture", "no row says", layer(0), {"architecture": "brandnew"}),
        ("unknown-architecture", "without an architecture", layer(0), {"architecture": None}),
        ("consumer-unsupported", "crashes", layer(0), {"architecture": "kimi-k3"}),
    ],
    "fused_name_is_free": [
        (
            "name-taken",
            "exists beside its parts",
            [*layer(0), ("blk.0.attn_qkv.weight", (16, 64), "Q8_0", None)],
            {},
        ),
    ],
    "companions_are_known": [
        (
            "unknown-companion",
            "nothing says how to merge lora",
            [*layer(0), *[(f"blk.0.attn_{p}.lora", (4,), "F32", None) for p in "qkv"]],
            {},
        ),
        (
            "consumer-unsupported",
            "never loads ffn_gate_up_exps.scale",
            EXPERT_SCALES,
            {"architecture": "qwen35moe"},
        ),
    ],
    "parts_are_complete": [
        ("missing-part", "has no attn_v", without("attn_v.weight", None), {}),
        (
            "bias-mismatch",
            "attn_k, attn_v has no bias",
            [*layer(0), ("blk.0.attn_q.bias", (8,), "F32", None)],
            {},
        ),
        ("scale-mismatch", "attn_v has no scale", scaled(1, 1, 1)[:-1], {}),
    ],
    "types_agree": [
        ("type-mismatch", "attn_v is Q4_0", without("attn_v.weight", dtype="Q4_0"), {}),
        (
            "type-mismatch",
            "bias: ",
            [*without("attn_q.bias", (8,), "F16"), *layer(0, bias=True)[4:8:2]],
            {},
        ),
    ],
    "shapes_agree": [
        ("shape-mismatch", "attn_k is [4, 32]", without("attn_k.weight", (4, 32)), {}),
    ],
    "kept_values_agree": [
        ("scale-mismatch", "scale differs", scaled(1, 2, 1), {}),
        ("scale-mismatch", "input_scale differs", scaled(1, 1, 3, "input_scale"), {}),
    ],
    "metadata_agrees": [
        (
            "metadata-mismatch",
            "says different things",
            layer(0),
            {"metadata": noted([("q", True), ("k", False), ("v", True)])},
        ),
        (
            "metadata-mismatch",
            "says different things",
            layer(0),
            {"metadata": noted([("q", True)])},
        ),
    ],
}
GUARDS = {guard.__name__: guard for guard in guards.GUARDS}
ROWS = [(name, *case) for name, cases in CASES.items() for case in cases]


def test_every_guard_has_a_case():
    """Here, or with Hugging Face checkpoints where it concerns only those."""
    from test_hf_guards import ROWS as HF_ROWS

    assert CASES.keys() | {row[0] for row in HF_ROWS} == GUARDS.keys()


@pytest.mark.parametrize("guard, reason, sentence, tensors, options", ROWS)
def test_guard_fires_and_the_group_stays(tmp_path, guard, reason, sentence, tensors, options):
    """A sound neighbour still fuses, unless the whole file is refused."""
    neighbour = layer(1)
    src = write(tmp_path / "a.gguf", [*tensors, *neighbour], **options)
    plan = fuseweights.plan(src)
    refusal = next(r for r in plan.refusals if r.layer == 0)
    assert (refusal.reason, refusal.layer) == (reason, 0)
    assert sentence in refusal.detail
    with pytest.raises(RefusedError) as caught:
        fuseweights.convert(src, tmp_path / "b.gguf", strict=True)
    assert refusal in caught.value.refusals and caught.value.exit_code == 3
    assert not (tmp_path / "b.gguf").exists()
    if guard == "consumer_loads_it":
        assert not plan.groups
        return
    assert [group.layer for group in plan.groups] == [1]
    fuseweights.convert(src, tmp_path / "b.gguf")
    old, new = (
        {t.name: t.data.tobytes() for t in GGUFReader(path).tensors}
        for path in (src, tmp_path / "b.gguf")
    )
    assert all(new[name] == old[name] for name, *_ in tensors)


@pytest.mark.parametrize("guard, reason, sentence, tensors, options", ROWS)
def test_without_the_guard_harm_is_done(
    tmp_path, monkeypatch, guard, reason, sentence, tensors, options
):
    """Planning breaks, the file is unreadable, or it no longer holds what its source holds.

    What a consumer does with a tensor it cannot load is shown on llama.cpp itself.
    """
    if guard == "consumer_loads_it" or reason == "consumer-unsupported":
        pytest.skip("shown in test_llama_cpp.py, on the consumer")
    src = write(tmp_path / "a.gguf", tensors, **options)
    monkeypatch.setattr(guards, "GUARDS", tuple(g for n, g in GUARDS.items() if n != guard))
    try:
        plan = fuseweights.convert(src, tmp_path / "b.gguf")
        assert plan.groups, "nothing was fused, so the guard was not what held it back"
        harmed = bool(fuseweights.verify(src, tmp_path / "b.gguf").differences)
    except FuseweightsError as error:
        harmed = isinstance(error, CorruptError)
    except (KeyError, ValueError, IndexError):
        harmed = True
    assert harmed


def test_mixed_types_stacked_anyway_give_other_numbers(tmp_path, monkeypatch):
    """The harm of a type mismatch in numbers: half the rows are read as another format."""
    src = write(tmp_path / "a.gguf", without("attn_v.weight", dtype="Q5_0"))
    kept = tuple(g for n, g in GUARDS.items() if n != "types_agree")
    monkeypatch.setattr(guards, "GUARDS", kept)
    fuseweights.convert(src, tmp_path / "b.gguf")
    v = next(t for t in GGUFReader(src).tensors if t.name == "blk.0.attn_v.weight")
    (qkv,) = (t for t in GGUFReader(tmp_path / "b.gguf").tensors if "qkv" in t.name)
    true = dequantize(v.data, v.tensor_type)
    read = dequantize(qkv.data, GGMLQuantizationType.Q8_0)[-4:]
    assert not np.array_equal(true, read)


def test_unequal_scales_kept_once_give_other_numbers(tmp_path, monkeypatch):
    src = write(tmp_path / "a.gguf", scaled(1, 2, 4))
    kept = tuple(g for n, g in GUARDS.items() if n != "kept_values_agree")
    monkeypatch.setattr(guards, "GUARDS", kept)
    fuseweights.convert(src, tmp_path / "b.gguf")
    fused = {t.name: t.data for t in GGUFReader(tmp_path / "b.gguf").tensors}
    assert fused["blk.0.attn_qkv.scale"].tolist() == [1]  # k was twice, v four times that


def test_equal_scales_fuse_into_one(tmp_path):
    src = write(tmp_path / "a.gguf", scaled(3, 3, 3))
    plan = fuseweights.convert(src, tmp_path / "b.gguf")
    assert [t.name for t in plan.groups[0].tensors] == [
        "blk.0.attn_qkv.weight",
        "blk.0.attn_qkv.scale",
    ]
    assert fuseweights.verify(src, tmp_path / "b.gguf").ok
    fuseweights.unfuse(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == src.read_bytes()


def test_order_is_part_of_the_contract(tmp_path):
    """A plain z stacked into qwen3next's interleaved ssm_in is refused, not written."""
    tensors = [
        ("blk.0.attn_qkv.weight", (8, 64), "Q8_0", None),
        ("blk.0.attn_gate.weight", (4, 64), "Q8_0", None),
        ("blk.0.ssm_conv1d.weight", (8, 4), "F32", None),
    ]
    src = write(tmp_path / "a.gguf", tensors, architecture="qwen3next")
    plan = fuseweights.plan(src, fuse=["gdn_qkvz"])
    assert [r.reason for r in plan.refusals] == ["order-mismatch"]
    assert fuseweights.plan(src, consumer="torch").groups[0].group == "gdn_qkvz"


def test_segments_match_whole(tmp_path):
    """attn_q_norm is no attn_q, and xattn_q no part of anything."""
    tensors = [
        *layer(0),
        ("blk.0.attn_q_norm.weight", (4,), "F32", None),
        ("blk.0.attn_k_norm.weight", (4,), "F32", None),
        ("blk.1.xattn_q.weight", (4, 64), "Q8_0", None),
        ("blk.1.attn_qk.weight", (4, 64), "Q8_0", None),
    ]
    plan = fuseweights.plan(write(tmp_path / "a.gguf", tensors))
    assert len(plan.groups) == 1 and not plan.refusals
    assert plan.copied == len(tensors) - 3


def test_four_way_gdn_falls_back_to_two_pairs(tmp_path):
    def mixer(ba: str) -> list:
        return [
            ("blk.0.attn_qkv.weight", (8, 64), "Q8_0", None),
            ("blk.0.attn_gate.weight", (4, 64), "Q8_0", None),
            ("blk.0.ssm_beta.weight", (2, 64), ba, None),
            ("blk.0.ssm_alpha.weight", (2, 64), ba, None),
            ("blk.0.ssm_conv1d.weight", (8, 4), "F32", None),
        ]

    four = fuseweights.plan(write(tmp_path / "a.gguf", mixer("Q8_0")), consumer="torch")
    two = fuseweights.plan(write(tmp_path / "b.gguf", mixer("F32")), consumer="torch")
    assert [g.group for g in four.groups] == ["gdn_in_proj"] and not four.refusals
    assert [g.group for g in two.groups] == ["gdn_qkvz", "gdn_ba"] and not two.refusals
    only = fuseweights.plan(tmp_path / "b.gguf", consumer="torch", fuse=["gdn_in_proj"])
    assert [r.reason for r in only.refusals] == ["type-mismatch"]
