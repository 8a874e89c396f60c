"""The verbs, without printing: what the command line calls and what Python users import."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from . import verifier
from .checkpoint.directory import INDEX, open_directory, open_file
from .checkpoint.gguf import open_gguf
from .checkpoint.model import Checkpoint
from .errors import CorruptError, RefusedError, UsageError
from .layout import layout_of, read_manifest
from .planner import Group, Plan, Refusal, decide, default_consumer, needed_build, refuse_if
from .rules.consumers import CONTAINERS
from .unfuser import FusedModule, fused_groups, plan_unfuse
from .verifier import Verification
from .writer import Progress, write


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a GGUF file, any file of a split set, a Hugging Face
    directory, any file of one, or a bare safetensors file.

    Raises CorruptError for what is not a well-formed checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return open_directory(path)
        if path.name == INDEX or (
            path.suffix == ".safetensors" and (path.parent / INDEX).is_file()
        ):
            return open_directory(path.parent)
        if path.suffix == ".safetensors":
            return open_file(path)
        return open_gguf(path)
    except OSError as error:
        raise CorruptError(f"{path}: {error.strerror}") from error


def plan(
    src: str | PathLike[str], *, consumer: str | None = None, fuse: Iterable[str] | None = None
) -> Plan:
    """What `convert` would write and refuse. `fuse` limits it to those groups."""
    with _no_collecting():
        return _plan(src, consumer, fuse)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """A plan is up to a million small objects that all live on: looking for garbage among them
    again and again takes a fifth of its time and finds none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _plan(src: str | PathLike[str], consumer: str | None, fuse: Iterable[str] | None) -> Plan:
    checkpoint = open_checkpoint(src)
    consumer = consumer or default_consumer(checkpoint)
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        raise RefusedError(
            f"{checkpoint.root}: was fused by fuseweights already, for {manifest.consumer}",
            hint="`fuseweights unfuse` gives back the original.",
        )
    groups, refusals = decide(checkpoint, consumer, fuse)
    outputs, inexact = layout_of(checkpoint).fuse(checkpoint, groups, consumer)
    copied = len(checkpoint.tensors) - sum(len(t.parts) for g in groups for t in g.tensors)
    needs = needed_build(checkpoint, consumer, {g.group for g in groups})
    return Plan(consumer, checkpoint, groups, refusals, copied, needs, inexact, outputs)


def convert(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    consumer: str | None = None,
    fuse: Iterable[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    clone: bool = True,
    sync: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Write the fused checkpoint at `dst` and return the plan that was carried out.

    Files are written in `threads`, or as tasks of any `executor`, for example one of a cluster
    whose machines see the same paths. With `clone` they share the source's blocks where the file
    system can, and the rest is copied.

    Raises RefusedError when there is nothing to fuse, when `strict` and anything is refused, or
    when `dst` exists or is `src`; CorruptError, WriteError. `progress` is called with bytes done
    and in all.
    """
    planned = plan(src, consumer=consumer, fuse=fuse)
    refuse_if(planned, strict)
    if not dry_run:
        write(
            planned.outputs,
            planned.checkpoint,
            Path(dst),
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            executor=executor,
            share=clone,
            sync=sync,
            progress=progress,
        )
    return planned


def unfuse(
    fused: str | PathLike[str],
    dst: str | PathLike[str],
    *,
    as_llama: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    clone: bool = True,
    sync: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Write the original checkpoint at `dst`: byte-identical unless `plan.inexact` says why not.

    `as_llama` splits instead what the architecture itself stores fused (phi3, gpt2, falcon …).
    """
    planned = plan_unfuse(open_checkpoint(fused), as_llama)
    write(
        planned.outputs,
        planned.checkpoint,
        Path(dst),
        overwrite=overwrite,
        threads=threads,
        share=clone,
        sync=sync,
        progress=progress,
    )
    return planned


@dataclass(frozen=True)
class Inspection:
    """What is fused in a checkpoint already, and per consumer what would be and what would not.

    `decisions` maps each consumer that reads this
    container to its groups and refusals; `consumer` is the one asked about.
    """

    checkpoint: Checkpoint
    consumer: str
    fused_for: str | None
    fused: tuple[FusedModule, ...]
    decisions: dict[str, tuple[tuple[Group, ...], tuple[Refusal, ...]]]

    def needs(self, consumer: str) -> int | None:
        """The consumer's first build that loads what is fused and what would be."""
        groups = {module.group for module in self.fused} | {
            g.group for g in self.decisions[consumer][0]
        }
        return needed_build(self.checkpoint, consumer, groups)


def inspect(path: str | PathLike[str], *, consumer: str | None = None) -> Inspection:
    """What is fused, what could be, what cannot and why, for every consumer of this container."""
    checkpoint = open_checkpoint(path)
    consumer = consumer or default_consumer(checkpoint)
    known = [c for c, kinds in CONTAINERS.items() if checkpoint.container in kinds]
    if consumer not in known:
        decide(checkpoint, consumer, None)  # raises, saying why
    manifest = read_manifest(checkpoint)
    return Inspection(
        checkpoint,
        consumer,
        manifest and manifest.consumer,
        fused_groups(checkpoint, manifest),
        {name: decide(checkpoint, name, None) for name in known},
    )


def verify(
    source: str | PathLike[str],
    fused: str | PathLike[str],
    *,
    values: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare every byte of `fused` with `source`; `values` also compares dequantized numbers.

    Raises CorruptError when either side cannot be read as a checkpoint, UsageError when they are
    given the wrong way round.
    """
    a, b = open_checkpoint(source), open_checkpoint(fused)
    manifest = read_manifest(b)
    if manifest is None and read_manifest(a) is not None:
        raise UsageError(
            f"{a.root}: is the fused one of the two", hint="The order is: verify SRC FUSED."
        )
    return verifier.verify(a, b, manifest, values=values, threads=threads, progress=progress)


def verify_source_sha256(
    fused: str | PathLike[str], expected: str | Mapping[str, str]
) -> Verification:
    """Whether un-fusing `fused` would give files with these sha256 sums, without writing them.

    `expected` is one hexadecimal sum, or one for each file name of a split set.
    Raises UsageError for sums that are none or names that the checkpoint has not.
    """
    planned = plan_unfuse(open_checkpoint(fused))
    names = [output.name for output in planned.outputs]
    if isinstance(expected, str):
        if len(names) > 1:
            raise UsageError(
                f"{fused}: consists of {len(names)} files", hint=f"Give {names[0]}=HEX for each."
            )
        expected = {names[0]: expected}
    if unknown := sorted(expected.keys() - set(names)):
        raise UsageError(f"no file {', '.join(unknown)}", hint=f"There are {', '.join(names)}.")
    if missing := [name for name in names if name not in expected]:
        raise UsageError(
            f"no sum for {', '.join(missing)}", hint="Every file of the set needs one: FILE=HEX."
        )
    for value in expected.values():
        if len(value) != 64 or set(value.lower()) - set("0123456789abcdef"):
            raise UsageError(f"{value!r} is not a sha256 sum: 64 hexadecimal digits")
    return verifier.verify_hash(planned.outputs, planned.checkpoint, expected)
