"""Proof that a fused checkpoint holds exactly what its source holds.

Both sides are read afresh. What each fused tensor must consist of, and in which order, is derived
from the rules and from the source's own tensors; the manifest is one more claim to check. The rule
tables and the readers are shared with planning; finding groups, guards, merging, layout and writing
are not. A wrong row of a table is therefore not found here, but by running the consumer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from types import ModuleType

from ..checkpoint.model import Checkpoint
from ..checkpoint.pieces import Sources, stream
from ..manifest import Manifest
from ..planner import Output
from . import directory_files, gguf_files
from .comparing import Progress, compare
from .matching import by_name, match
from .results import Difference, Section, Verification

FILES: dict[str, ModuleType] = {"gguf": gguf_files, "safetensors": directory_files}

__all__ = ["Difference", "Progress", "Section", "Verification", "verify", "verify_hash"]


def verify(
    source: Checkpoint,
    fused: Checkpoint,
    manifest: Manifest | None,
    *,
    values: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare every byte of every tensor, and all metadata that is not ours."""
    if source.container != fused.container:
        detail = f"is {fused.container}, the source is {source.container}"
        return Verification(0, 0, (Difference(str(fused.root), None, detail),))
    differences: list[Difference] = []
    sections = list(match(source, fused, differences))
    made = by_name(sections)
    differences += FILES[source.container].metadata(source, fused, manifest, made)
    if manifest is not None:
        differences += _manifest(source, fused, manifest, made)
    differences += compare(source, fused, sections, threads, progress)
    notes: list[str] = []
    if values:
        from .values import compare_values

        differences += compare_values(source, fused, sections, notes)
    size = sum(tensor.size for tensor in fused.tensors.values())
    return Verification(len(fused.tensors), size, tuple(differences), tuple(dict.fromkeys(notes)))


def _manifest(
    source: Checkpoint, fused: Checkpoint, manifest: Manifest, made: Mapping[str, list[Section]]
) -> Iterator[Difference]:
    """The manifest must describe this source, or un-fusing would not return it."""
    index = {t.name: i for file in source.files for i, t in enumerate(file.tensors)}
    for name in sorted(made.keys() ^ {entry.name for entry in manifest.entries}):
        yield Difference(name, None, "only one of the manifest and the rules knows it as fused")
    for entry in manifest.entries:
        sections = made.get(entry.name, [])
        parts = [(s.part.name, s.part.shape, s.part.file, index[s.part.name]) for s in sections]
        if parts != [(p.name, p.shape, p.file, p.index) for p in entry.parts]:
            yield Difference(entry.name, None, "the manifest does not describe its parts")
            continue
        if not sections:
            continue
        merge, axis = sections[0].merge, sections[0].axis
        kind = {"shape": "literal", "state": "literal"}.get(merge, merge)
        if entry.merge != kind or (kind == "stack" and entry.axis != axis):
            yield Difference(entry.name, None, "the manifest says it was merged in another way")
        for part, section in zip(entry.parts, sections, strict=True):
            rows = section.end - section.begin
            data = source.read(section.part).hex() if kind == "literal" else None
            if part.data != data or (kind in ("stack", "expand") and part.rows != rows):
                yield Difference(entry.name, None, f"the manifest is wrong about {part.name}")
    moved = {s.part.name for sections in made.values() for s in sections}
    for file, recorded in zip(source.files, manifest.files, strict=False):
        yield from FILES[source.container].origin(file, recorded)
    if len(manifest.files) != len(source.files):
        yield Difference("", None, f"the manifest speaks of {len(manifest.files)} files")
    kept = {file: [] for file in range(len(source.files))}
    for tensor in fused.tensors.values():
        if tensor.name in source.tensors:
            kept[source.tensors[tensor.name].file].append(tensor.name)
    for number, file in enumerate(source.files):
        if [t.name for t in file.tensors if t.name not in moved] != kept[number]:
            yield Difference(file.path.name, None, "the kept tensors changed file or order")


def verify_hash(
    outputs: Iterable[Output], checkpoint: Checkpoint, expected: Mapping[str, str]
) -> Verification:
    """Hash the files that un-fusing would write, without writing them, against sha256 values."""
    differences, size = [], 0
    with Sources(checkpoint.paths) as sources:
        for output in outputs:
            if output.name not in expected:
                continue
            digest = sha256()
            for view in stream(output.pieces, sources):
                digest.update(view)
            size += output.size
            if digest.hexdigest() != expected[output.name].lower():
                detail = f"sha256 is {digest.hexdigest()}, expected {expected[output.name]}"
                differences.append(Difference(output.name, None, detail))
    for file in checkpoint.files:
        file.check_unchanged()
    return Verification(len(checkpoint.tensors), size, tuple(differences))
