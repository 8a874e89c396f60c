"""verify must miss nothing: every mutant of a fused file is either unreadable or different."""

from __future__ import annotations

import json
import random

import pytest
from gguf import GGUFReader
from raw_gguf import ARRAY, I32, STRING, layer, write

import fuseweights
from fuseweights import CorruptError, manifest, open_checkpoint
from fuseweights.checkpoint import gguf, gguf_compose
from fuseweights.checkpoint.pieces import Sources, stream
from fuseweights.verifier import comparing


def experts(n: int, count: int = 3) -> list:
    return [
        (f"blk.{n}.ffn_{part}_exps.weight", (count, 4, 32), "Q8_0", None) for part in ("gate", "up")
    ]


@pytest.fixture
def pair(tmp_path):
    keys = [
        ("general.tensor_extra.name", ARRAY, (STRING, ["blk.0.attn_q.weight", "x"])),
        ("general.tensor_extra.prec_a4", ARRAY, (I32, [1, 2])),
        ("tokens", ARRAY, (STRING, ["a", "b", "c"])),
    ]
    keys[0] = (*keys[0][:2], (STRING, [f"blk.0.attn_{p}.weight" for p in "qkv"]))
    keys[1] = (*keys[1][:2], (I32, [1, 1, 1]))
    tensors = [
        *layer(0, q=4, kv=4, k_width=32, bias=True),
        *layer(1, q=4, kv=4, k_width=32),
        *experts(0),
        ("norm", (3,), "F32", None),
    ]
    src = write(tmp_path / "a.gguf", tensors, keys, architecture="deepseek2", alignment=64)
    fused = tmp_path / "b.gguf"
    fuseweights.convert(src, fused, consumer="torch")
    return src, fused


def survives(src, mutant) -> bool:
    try:
        return fuseweights.verify(src, mutant, threads=1).ok
    except CorruptError:
        return False


def test_the_pair_itself_is_equal(pair):
    src, fused = pair
    for values in (False, True):
        found = fuseweights.verify(src, fused, values=values)
        assert found.ok and found.differences == () and found.notes == ()
    assert found.checked == len(GGUFReader(fused).tensors)
    assert fuseweights.verify(src, src).ok


def test_no_single_bit_can_flip(pair, tmp_path):
    """Everywhere: header, metadata, manifest, tensor infos, padding, data."""
    src, fused = pair
    whole, rng = fused.read_bytes(), random.Random(0)
    mutant = tmp_path / "m.gguf"
    for position in rng.sample(range(len(whole)), min(3000, len(whole))):
        raw = bytearray(whole)
        raw[position] ^= 1 << rng.randrange(8)
        mutant.write_bytes(raw)
        assert not survives(src, mutant), f"bit flip at byte {position} of {len(whole)} survived"


def test_no_byte_can_go_or_come(pair, tmp_path):
    src, fused = pair
    whole, mutant = fused.read_bytes(), tmp_path / "m.gguf"
    for raw in (whole[:-1], whole + b"x", whole[:-64], b"\0" + whole):
        mutant.write_bytes(raw)
        assert not survives(src, mutant)


def rebuilt(fused, target, change, edit_manifest=None):
    """`fused` laid out again with its tensor list changed, and a manifest that checks out."""
    file = open_checkpoint(fused).files[0]
    tensors = [[t.name, t.shape, t.dtype, t.bytes, t.size] for t in file.tensors]
    change(tensors)
    replace = {}
    if edit_manifest:
        data = json.loads(gguf.read_value(file, manifest.KEY, 1 << 20))
        edit_manifest(data)
        del data["sha256"]
        data["sha256"] = manifest._checksum(data)
        replace[manifest.KEY] = gguf_compose.packed_string(file.order, json.dumps(data).encode())
    pieces = gguf_compose.compose(file, 0, tensors, replace=replace)
    with Sources([fused]) as sources:
        target.write_bytes(b"".join(map(bytes, stream(pieces, sources))))


def at(tensors, name):
    return next(i for i, row in enumerate(tensors) if row[0] == name)


def swap(a: str, b: str):
    """Two tensors of one shape exchange their bytes."""

    def change(tensors):
        i, j = at(tensors, a), at(tensors, b)
        tensors[i][3], tensors[j][3] = tensors[j][3], tensors[i][3]

    return change


def swap_sections(name: str, parts: int, axis_rounds: int, i: int, j: int):
    """Two equal sections of a fused tensor exchange their bytes."""

    def change(tensors):
        row = tensors[at(tensors, name)]
        (strand,) = row[3].strands
        size = row[4] // axis_rounds // parts
        order = list(range(parts))
        order[i], order[j] = j, i
        runs = [
            (strand.file, strand.offset + r * row[4] // axis_rounds + k * size, size, size)
            for r in range(axis_rounds)
            for k in order
        ]
        row[3] = row[3]._replace(strands=tuple(strand._make(run) for run in runs))

    return change


def reorder_experts(name: str, experts: int):
    def change(tensors):
        row = tensors[at(tensors, name)]
        (strand,) = row[3].strands
        size = row[4] // experts
        runs = [
            strand._make((strand.file, strand.offset + e * size, size, size))
            for e in reversed(range(experts))
        ]
        row[3] = row[3]._replace(strands=tuple(runs))

    return change


def rename(old: str, new: str):
    def change(tensors):
        tensors[at(tensors, old)][0] = new

    return change


def retype(name: str, dtype: str):
    def change(tensors):
        tensors[at(tensors, name)][2] = dtype

    return change


def reshape(name: str, shape: tuple[int, ...]):
    def change(tensors):
        tensors[at(tensors, name)][1] = shape

    return change


QKV = "blk.0.attn_qkv.weight"
STRUCTURAL = {
    "sections swapped": swap_sections(QKV, 3, 1, 1, 2),
    "gate and up swapped": swap_sections("blk.0.ffn_gate_up_exps.weight", 2, 3, 0, 1),
    "experts reordered": reorder_experts("blk.0.ffn_gate_up_exps.weight", 3),
    "layers swapped": swap(QKV, "blk.1.attn_qkv.weight"),
    "tensor dropped": lambda tensors: tensors.pop(at(tensors, "norm")),
    "fused tensor dropped": lambda tensors: tensors.pop(at(tensors, QKV)),
    "tensor added": lambda tensors: tensors.append(["extra", (), "F32", b"1234", 4]),
    "tensors in another order": lambda tensors: tensors.reverse(),
    "renamed": rename("norm", "morn"),
    "fused tensor renamed": rename(QKV, "blk.2.attn_qkv.weight"),
    "another type of the same size": retype("norm", "I32"),
    "another type of the same size when fused": retype("blk.0.attn_qkv.bias", "I32"),
    "another shape of the same size": reshape("norm", (3, 1)),
}


@pytest.mark.parametrize("case", STRUCTURAL)
def test_structural_mutants(pair, tmp_path, case):
    src, fused = pair
    rebuilt(fused, tmp_path / "same.gguf", lambda tensors: None)
    assert (tmp_path / "same.gguf").read_bytes() == fused.read_bytes()
    rebuilt(fused, tmp_path / "m.gguf", STRUCTURAL[case])
    assert not survives(src, tmp_path / "m.gguf")


def entry(data, name=QKV):
    return next(e for e in data["entries"] if e["name"] == name)


def put(entry, part, column, value):
    """Change one column of [name, shape, file, index, rows, data]."""
    entry["parts"][part][column] = value


def lie(change):
    return lambda data: change(data, entry(data))


LIES = {
    "order of parts": lie(lambda d, e: e["parts"].reverse()),
    "a part's name": lie(lambda d, e: put(e, 0, 0, "blk.0.attn_z.weight")),
    "a part's rows": lie(
        lambda d, e: (
            put(e, 0, 1, [3, 32]),
            put(e, 0, 4, 3),
            put(e, 1, 1, [5, 32]),
            put(e, 1, 4, 5),
        )
    ),
    "a part's place": lie(lambda d, e: put(e, 0, 3, e["parts"][1][3])),
    "places exchanged": lie(
        lambda d, e: (
            (own := e["parts"][0][3]),
            put(e, 0, 3, e["parts"][1][3]),
            put(e, 1, 3, own),
        )
    ),
    "a place outside": lie(lambda d, e: put(e, 0, 3, 10**6)),
    "a file outside": lie(lambda d, e: put(e, 0, 2, 7)),
    "a negative place": lie(lambda d, e: put(e, 0, 3, -1)),
    "the axis": lie(lambda d, e: e.update(axis=1)),
    "how it merged": lie(lambda d, e: e.update(merge="same")),
    "no such merge": lie(lambda d, e: e.update(merge="mix")),
    "the tail": lie(lambda d, e: d["files"][0].update(tail=1)),
    "an entry dropped": lie(lambda d, e: d["entries"].remove(e)),
    "an entry twice": lie(lambda d, e: d["entries"].append(e)),
    "a fused tensor that is not there": lie(lambda d, e: e.update(name="nothing")),
    "a part that is there": lie(lambda d, e: put(e, 0, 0, "norm")),
    "a replaced value": lie(
        lambda d, e: d["files"][0]["replaced"].update(
            {"general.tensor_extra.name": "08000000" + "00" * 8}
        )
    ),
    "a replaced value that is no hex": lie(
        lambda d, e: d["files"][0].update(replaced={"tokens": "xyz"})
    ),
    "another file more": lie(lambda d, e: d["files"].append(d["files"][0])),
    "no files": lie(lambda d, e: d.pop("files")),
    "another schema": lie(lambda d, e: d.update(schema=2)),
    "a part's rows alone": lie(lambda d, e: put(e, 0, 4, 3)),
    "bytes that are no hex": lie(lambda d, e: put(e, 0, 5, "zz")),
    "a column too few": lie(lambda d, e: e["parts"][0].pop()),
    "texts no object": lie(lambda d, e: d.update(texts=[])),
    "one part": lie(lambda d, e: e.update(parts=e["parts"][:1])),
    "parts no list": lie(lambda d, e: e.update(parts={"a": 1})),
}


@pytest.mark.parametrize("case", LIES)
def test_manifests_that_lie(pair, tmp_path, case):
    """With a checksum that matches: verify finds out, and un-fusing never passes it off as true."""
    src, fused = pair
    rebuilt(fused, tmp_path / "m.gguf", lambda tensors: None, LIES[case])
    assert not survives(src, tmp_path / "m.gguf")
    try:
        fuseweights.unfuse(tmp_path / "m.gguf", tmp_path / "back.gguf")
    except fuseweights.FuseweightsError:
        assert not (tmp_path / "back.gguf").exists()
    else:
        assert not fuseweights.verify(src, tmp_path / "back.gguf").ok or (
            (tmp_path / "back.gguf").read_bytes() != src.read_bytes()
        )


def test_differences_say_where(pair, tmp_path):
    src, fused = pair
    tensor = open_checkpoint(fused).tensors[QKV]
    raw = bytearray(fused.read_bytes())
    raw[tensor.offset + 200] ^= 1
    (tmp_path / "m.gguf").write_bytes(raw)
    (difference,) = fuseweights.verify(src, tmp_path / "m.gguf").differences
    assert (difference.tensor, difference.offset) == (QKV, 200)
    assert "blk.0.attn_k.weight" in difference.detail
    found = fuseweights.verify(src, tmp_path / "m.gguf", values=True).differences
    assert any("value" in d.detail for d in found)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_every_block_size_finds_every_byte(pair, tmp_path, monkeypatch, block):
    """The comparison's windows have no gaps, whatever their size."""
    src, fused = pair
    monkeypatch.setattr(comparing, "BLOCK", block)
    monkeypatch.setattr(comparing, "JOB", 4 * block)
    assert fuseweights.verify(src, fused).ok
    tensor = open_checkpoint(fused).tensors["blk.0.ffn_gate_up_exps.weight"]
    whole = fused.read_bytes()
    for offset in range(0, tensor.size, 97):
        raw = bytearray(whole)
        raw[tensor.offset + offset] ^= 0x10
        (tmp_path / "m.gguf").write_bytes(raw)
        (difference,) = fuseweights.verify(src, tmp_path / "m.gguf").differences
        assert difference.offset == offset


def test_hash_of_the_virtual_original(pair, tmp_path):
    import hashlib

    src, fused = pair
    right = hashlib.sha256(src.read_bytes()).hexdigest()
    assert fuseweights.verify_source_sha256(fused, right).ok
    assert fuseweights.verify_source_sha256(fused, right.upper()).ok
    wrong = fuseweights.verify_source_sha256(fused, "0" * 64)
    assert not wrong.ok and right in wrong.differences[0].detail
    for malformed in ("", "12", "g" * 64):
        with pytest.raises(fuseweights.UsageError):
            fuseweights.verify_source_sha256(fused, malformed)
    with pytest.raises(fuseweights.UsageError, match="no file"):
        fuseweights.verify_source_sha256(fused, {"other.gguf": right})
