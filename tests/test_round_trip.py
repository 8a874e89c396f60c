"""unfuse(convert(x)) == x, to the byte, for whatever x."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_gguf import ARRAY, F32, I32, STRING, U32, layer, pack, write, write_split

import fuseweights
from fuseweights import RefusedError

TYPES = [t.name for t in GGMLQuantizationType]


def there_and_back(src: Path, directory: Path, **options) -> fuseweights.Plan:
    """Convert, verify, un-fuse, compare every file and the hash of the virtual original."""
    split = len(fuseweights.open_checkpoint(src).files) > 1
    fused, back = directory / "fused", directory / "back"
    if not split:
        fused, back = fused.with_suffix(".gguf"), back.with_suffix(".gguf")
    plan = fuseweights.convert(src, fused, **options)
    first = fused / src.name if split else fused
    assert fuseweights.verify(src, first).differences == ()
    unfused = fuseweights.unfuse(first, back)
    originals = plan.checkpoint.paths
    restored = [back / path.name for path in originals] if split else [back]
    for original, path in zip(originals, restored, strict=True):
        assert path.read_bytes() == original.read_bytes()
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in originals}
    expected = sums if split else sums[src.name]
    assert fuseweights.verify_source_sha256(first, expected).ok
    assert plan.inexact is None and unfused.inexact is None
    for output, path in zip(plan.outputs, sorted(first.parent.glob(first.name)), strict=False):
        assert path.stat().st_size == output.size
    return plan


@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_and_alignment(tmp_path, dtype, alignment):
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    width = max(64, block)
    src = write(tmp_path / "a.gguf", layer(0, dtype=dtype, k_width=width), alignment=alignment)
    for consumer, groups in (("llama.cpp", ["qkv"]), ("torch", ["qkv", "gate_up"])):
        directory = tmp_path / consumer
        directory.mkdir()
        plan = there_and_back(src, directory, consumer=consumer)
        assert [group.group for group in plan.groups] == groups


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("tail", [None, 0, 7, 5000])
def test_versions_byte_orders_and_tails(tmp_path, version, order, tail):
    tensors = layer(0, bias=True)
    src = write(tmp_path / "a.gguf", tensors, version=version, order=order, tail=tail)
    there_and_back(src, tmp_path)


def test_fused_file_is_what_gguf_py_reads(tmp_path):
    src = write(tmp_path / "a.gguf", [*layer(0, bias=True), *layer(1, attn_v="Q4_0")])
    fuseweights.convert(src, tmp_path / "b.gguf")
    old = {t.name: t.data.tobytes() for t in GGUFReader(src).tensors}
    new = {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / "b.gguf").tensors}
    for suffix in ("weight", "bias"):
        parts = [old.pop(f"blk.0.attn_{part}.{suffix}") for part in "qkv"]
        assert new.pop(f"blk.0.attn_qkv.{suffix}") == b"".join(parts)
    assert new == old


def test_experts_interleave_per_expert(tmp_path):
    shapes = [("ffn_gate_exps", (5, 4, 64)), ("ffn_up_exps", (5, 4, 64))]
    tensors = [(f"blk.0.{name}.weight", shape, "Q8_0", None) for name, shape in shapes]
    src = write(tmp_path / "a.gguf", tensors, architecture="deepseek2")
    there_and_back(src, tmp_path)
    gate, up = (t.data.reshape(5, -1) for t in GGUFReader(src).tensors)
    (fused,) = GGUFReader(tmp_path / "fused.gguf").tensors
    assert tuple(fused.shape) == (64, 8, 5)
    for expert, raw in enumerate(fused.data.reshape(5, -1)):
        assert raw.tobytes() == gate[expert].tobytes() + up[expert].tobytes()


def test_split_sets(tmp_path):
    """Vocabulary-only first file; parts of one group in different files."""
    whole = [*layer(0, bias=True), *layer(1)]
    words = [("tokens", ARRAY, (STRING, ["", "a", "bc"])), ("none", ARRAY, (U32, []))]
    src = write_split(tmp_path, [[], whole[:3], whole[3:9], whole[9:]], metadata=words)
    plan = there_and_back(src, tmp_path)
    assert [output.name for output in plan.outputs] == [p.name for p in plan.checkpoint.paths]
    counts = [
        GGUFReader(path).fields["split.tensors.count"].contents()
        for path in sorted((tmp_path / "fused").glob("*.gguf"))
    ]
    assert counts == [len(whole) - 6] * 4


@pytest.mark.parametrize("parts", [1, 3])
def test_metadata_that_names_tensors_is_renamed_along(tmp_path, parts):
    names = ["output.weight", *(f"blk.0.attn_{p}.weight" for p in "qkv"), "blk.0.ffn_up.weight"]
    keys = [
        ("general.tensor_extra.name", ARRAY, (STRING, names)),
        ("general.tensor_extra.prec_a4", ARRAY, (I32, [1, 2, 2, 2, 5])),
    ]
    tensors = layer(0)
    src = write(tmp_path / "a.gguf", tensors, keys)
    there_and_back(src, tmp_path)
    fields = GGUFReader(tmp_path / "fused.gguf").fields
    assert fields["general.tensor_extra.name"].contents() == [
        "output.weight",
        "blk.0.attn_qkv.weight",
        "blk.0.ffn_up.weight",
    ]
    assert fields["general.tensor_extra.prec_a4"].contents() == [1, 2, 5]


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda raw: raw + b"more", "other bytes than zeros after the last tensor"),
        (lambda raw: raw[:-1] + b"\1", "other bytes than zeros after the last tensor"),
    ],
)
def test_unusual_files_say_that_they_come_back_as_tensors_only(tmp_path, change, why):
    src = tmp_path / "a.gguf"
    src.write_bytes(change(pack([*layer(0), ("end", (3,), "F32", None)])))
    plan = fuseweights.convert(src, tmp_path / "b.gguf")
    assert plan.inexact is not None and why in plan.inexact
    back = fuseweights.unfuse(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert back.inexact == plan.inexact
    old, new = (
        {t.name: t.data.tobytes() for t in GGUFReader(p).tensors}
        for p in (src, tmp_path / "c.gguf")
    )
    assert old == new and (tmp_path / "c.gguf").read_bytes() != src.read_bytes()


def test_tensors_out_of_order_say_so(tmp_path):
    tensors = layer(0)
    raw = bytearray(pack(tensors))
    names = [f"blk.0.attn_{p}.weight".encode() for p in "kv"]  # same size: swap their offsets
    at = [raw.index(name) + len(name) + 4 + 16 + 4 for name in names]
    raw[at[0] : at[0] + 8], raw[at[1] : at[1] + 8] = (
        raw[at[1] : at[1] + 8],
        raw[at[0] : at[0] + 8],
    )
    src = tmp_path / "a.gguf"
    src.write_bytes(raw)
    plan = fuseweights.convert(src, tmp_path / "b.gguf")
    assert "does not follow" in plan.inexact
    assert fuseweights.verify(src, tmp_path / "b.gguf").ok
    fuseweights.unfuse(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert fuseweights.verify(src, tmp_path / "c.gguf").ok


def test_what_llama_cpps_converter_fuses_comes_apart_by_rule(tmp_path):
    """No manifest: sizes from the file's own metadata, parts where the fused tensor stood."""
    apart = [*layer(0, q=8, kv=4, bias=True), *layer(1, q=8, kv=2)]
    keys = [
        ("llama.attention.head_count", U32, 4),
        ("llama.attention.head_count_kv", ARRAY, (I32, [2, 1])),
        ("llama.attention.key_length", U32, 2),
        ("llama.attention.value_length", U32, 2),
    ]
    src = write(tmp_path / "apart.gguf", apart, keys)
    fuseweights.convert(src, tmp_path / "ours.gguf")
    tensors = [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, t.data.tobytes())
        for t in GGUFReader(tmp_path / "ours.gguf").tensors
    ]
    theirs = write(tmp_path / "theirs.gguf", tensors, keys)
    assert fuseweights.verify(src, theirs).ok
    plan = fuseweights.unfuse(theirs, tmp_path / "back.gguf")
    assert "no manifest" in plan.inexact
    assert fuseweights.verify(src, tmp_path / "back.gguf").ok


def test_sizes_that_cannot_be_told_are_not_guessed(tmp_path):
    src = write(tmp_path / "a.gguf", [("blk.0.attn_qkv.weight", (16, 64), "Q8_0", None)])
    with pytest.raises(RefusedError) as caught:
        fuseweights.unfuse(src, tmp_path / "b.gguf")
    assert caught.value.refusals[0].reason == "unknown-sizes"


def test_nothing_to_do_is_refused(tmp_path):
    plain = write(tmp_path / "a.gguf", [("output.weight", (4, 64), "F16", None)])
    with pytest.raises(RefusedError, match="nothing to fuse"):
        fuseweights.convert(plain, tmp_path / "b.gguf")
    with pytest.raises(RefusedError, match="nothing to un-fuse"):
        fuseweights.unfuse(plain, tmp_path / "b.gguf")
    src = write(tmp_path / "c.gguf", layer())
    fuseweights.convert(src, tmp_path / "d.gguf")
    with pytest.raises(RefusedError, match="fused by fuseweights already"):
        fuseweights.convert(tmp_path / "d.gguf", tmp_path / "e.gguf", consumer="torch")


@st.composite
def checkpoints(draw):
    """(files, options): random layers with groups whole, partial or mixed, in random order."""
    tensors = []
    for n in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(["F32", "F16", "Q8_0", "Q4_0", "MXFP4"]))
        odd = draw(st.dictionaries(st.sampled_from(["attn_v", "ffn_up"]), st.just("Q5_0")))
        block = layer(
            n, q=draw(st.integers(1, 9)), kv=draw(st.integers(0, 5)), dtype=dtype,
            bias=draw(st.booleans()), **odd,
        )  # fmt: skip
        if draw(st.booleans()):
            experts = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 64
            block += [
                (f"blk.{n}.ffn_{p}_exps.weight", experts, dtype, None) for p in ("gate", "up")
            ]
        absent = draw(st.sets(st.sampled_from([name for name, *_ in block]), max_size=2))
        tensors += [t for t in block if t[0] not in absent]
    tensors += [("token_embd.weight", (draw(st.integers(0, 3)), 32), "F32", None)]
    if draw(st.booleans()):
        tensors.append(("", (), "F32", None))  # a scalar with a name of no length
    tensors = draw(st.permutations(tensors))
    cuts = sorted(draw(st.lists(st.integers(0, len(tensors)), max_size=2)))
    files = [tensors[a:b] for a, b in zip([0, *cuts], [*cuts, len(tensors)], strict=True)]
    options = {
        "alignment": draw(st.sampled_from([None, 32, 64, 4096])),
        "version": draw(st.sampled_from([2, 3])),
        "order": draw(st.sampled_from("<>")),
        "tail": draw(st.sampled_from([None, 0, 3])),
    }
    keys = draw(
        st.lists(
            st.sampled_from(
                [
                    ("x.empty", ARRAY, (F32, [])),
                    ("x.strings", ARRAY, (STRING, ["", "ü", "z" * 99])),
                    ("x.nested", ARRAY, (ARRAY, [(U32, [1]), (STRING, [""])])),
                    ("", STRING, ""),
                ]
            ),
            unique_by=lambda key: key[0],
        )
    )
    return files, keys, options


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(checkpoint=checkpoints(), consumer=st.sampled_from(["llama.cpp", "torch"]))
def test_random_checkpoints(tmp_path_factory, checkpoint, consumer):
    files, keys, options = checkpoint
    directory = tmp_path_factory.mktemp("random")
    if len(files) == 1:
        src = write(directory / "a.gguf", files[0], keys, **options)
    else:
        src = write_split(directory, files, metadata=keys, **options)
    try:
        plan = there_and_back(src, directory, consumer=consumer)
    except RefusedError as error:
        assert "nothing to fuse" in str(error)
        return
    merged = [part.name for g in plan.groups for t in g.tensors for part in t.parts]
    names = {name for file in files for name, *_ in file}
    assert len(set(merged)) == len(merged) and plan.copied == len(names) - len(merged)
