"""Every error fuseweights raises on purpose: one tree, each class knows its exit code."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates escaped, safe to print on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FuseweightsError(Exception):
    """Base of the tree. `hint` tells the user what to do next, `usual_hint` when nothing more is
    known; `exit_code` is the CLI's."""

    exit_code = 4
    usual_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(printable(message))
        hint = hint or self.usual_hint
        self.hint = hint and printable(hint)


class UsageError(FuseweightsError):
    """The call cannot mean anything: an unknown group, a consumer that never reads this format."""

    exit_code = 2
    usual_hint = "`fuseweights COMMAND --help` says what may be given."


class RefusedError(FuseweightsError):
    """Nothing was written because doing it would break a promise. `refusals` lists every one."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None, refusals: tuple = ()):
        super().__init__(message, hint=hint)
        self.refusals = refusals


class CorruptError(FuseweightsError):
    """A file is not what it claims to be."""

    usual_hint = "Check the path, and the file against its published size or checksum."


class SourceChangedError(FuseweightsError):
    """The source changed or shrank while it was being read."""


class WriteError(FuseweightsError):
    """The operating system would not let us read or write: no space, no permission, I/O error."""

    usual_hint = "The source and the target are as they were."
