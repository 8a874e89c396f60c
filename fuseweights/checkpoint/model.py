"""What a checkpoint is, whatever its container: files, and named tensors that are spans of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CorruptError, SourceChangedError
from .pieces import Sources, Weave, span


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named span of a file. `shape` is row-major (outermost first); sizes are in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: int
    offset: int
    size: int

    @property
    def place(self) -> tuple[int, int, int]:
        return self.file, self.offset, self.size

    @property
    def bytes(self) -> Weave:
        return span(*self.place)


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when opened: enough to notice that it has changed since."""

    path: Path
    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def identity(path: Path) -> dict:
        """The constructor's arguments for `path` as it is now."""
        stat = os.stat(path)
        return {
            "path": path,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "inode": stat.st_ino,
        }

    def check_unchanged(self) -> None:
        """Raises SourceChangedError when size, time or inode differ from when it was opened."""
        try:
            now = self.identity(self.path)
        except OSError:  # it is gone
            now = {"inode": None}
        if any(now[key] != getattr(self, key) for key in now):
            raise SourceChangedError(
                f"{self.path}: changed while it was being read",
                hint="Run again when nothing writes to it.",
            )


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file or split set, or a Hugging Face directory.

    `tensors` holds every tensor of every file, in file order and then in header order.
    """

    container: str
    root: Path
    files: tuple[SourceFile, ...]
    tensors: dict[str, Tensor]
    architecture: str

    @property
    def quantization(self) -> dict:
        """The quantization's configuration, where the container keeps one beside the tensors."""
        return {}

    @property
    def layers(self) -> int | None:
        """How many layers the configuration gives the text model, if there is one."""
        return None

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every file that pieces may come from, in the order of their numbers."""
        return tuple(file.path for file in self.files)

    def read(self, tensor: Tensor, limit: int = 1 << 20) -> bytes:
        """The bytes of a small tensor. Raises CorruptError when it has more than `limit`."""
        if tensor.size > limit:
            raise CorruptError(f"{tensor.name} has {tensor.size} bytes, at most {limit} expected")
        with Sources(self.paths) as sources:
            return bytes(sources.read(*tensor.place))
