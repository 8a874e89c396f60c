"""The command line: parse, call the API, render. No logic of its own."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from . import __version__, api
from .errors import FuseweightsError, RefusedError, UsageError, printable

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fuse the weights of a finished model checkpoint without changing one bit of them.",
)


class Names(StrEnum):
    """Whose names parts get that had none of their own."""

    llama = "llama"


Consumer = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Who will load it: llama.cpp (the default for a GGUF), torch (for a directory), vllm "
        "or sglang.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.")]
Overwrite = Annotated[bool, typer.Option(help="Replace DST if it exists.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Files written at a time. Default: one a core.")
]
Clone = Annotated[
    bool,
    typer.Option("--clone/--no-clone", help="Share the source's blocks where the disk can."),
]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Report errors and end with the contract's exit code: typer would end an interrupted run
    without a word, and one whose reader is gone with 1, which says that verify found a
    difference."""

    @wraps(command)
    def reported(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            _print_notes(error)
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, BrokenPipeError):  # or the interpreter would try again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_failed(error)) from None

    return reported


def _version(show: bool) -> None:
    if show:
        print(f"fuseweights {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_reported
def inspect(
    ckpt: Annotated[Path, typer.Argument(help="A GGUF file, any of a split set, or a directory.")],
    consumer: Consumer = None,
    as_json: Json = False,
) -> None:
    """Show what is fused, what would be, what cannot and why, and who loads the result.

    Example: fuseweights inspect model.gguf
    """
    found = api.inspect(ckpt, consumer=consumer)
    _print(as_json, "inspection", found)


@app.command()
@_reported
def convert(
    src: Annotated[Path, typer.Argument(help="The checkpoint to fuse. It is only read.")],
    dst: Annotated[Path, typer.Argument(help="Where the fused one goes.")],
    consumer: Consumer = None,
    fuse: Annotated[
        str | None, typer.Option(metavar="GROUP,…", help="Only these groups, e.g. qkv,experts.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse if any group is.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and report, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the whole files of a run that was cut off.")
    ] = False,
    threads: Threads = None,
    clone: Clone = True,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://…", help="Write on a Dask cluster that sees the same paths."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the fused checkpoint.

    Example: fuseweights convert model.gguf model-fused.gguf
    """
    groups = None if fuse is None else [name.strip() for name in fuse.split(",") if name.strip()]
    begun = time.perf_counter()
    with _executor(scheduler) as executor, _progress(quiet or dry_run, "Fusing") as tick:
        plan = api.convert(
            src,
            dst,
            consumer=consumer,
            fuse=groups,
            strict=strict,
            dry_run=dry_run,
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            executor=executor,
            clone=clone,
            progress=tick,
        )
    seconds = None if dry_run else time.perf_counter() - begun
    if as_json or not quiet:
        _print(as_json, "plan", plan, "would fuse" if dry_run else "fused", seconds)


@app.command()
@_reported
def verify(
    src: Annotated[Path, typer.Argument(help="The source; with --source-sha256 the fused one.")],
    fused: Annotated[Path | None, typer.Argument(help="The fused checkpoint.")] = None,
    source_sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="[FILE=]HEX", help="The source's published sum, instead of SRC."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Also compare dequantized numbers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that FUSED holds exactly what SRC holds. Exit code 1 when it does not.

    Example: fuseweights verify model.gguf model-fused.gguf

    Example: fuseweights verify model-fused.gguf --source-sha256 1b2c…
    """
    if (fused is None) != bool(source_sha256):
        raise UsageError(
            "verify takes SRC FUSED, or FUSED --source-sha256 HEX",
            hint="`fuseweights verify --help` has an example of each.",
        )
    if source_sha256:
        if values:
            raise UsageError("--values needs the source: verify SRC FUSED --values")
        result = api.verify_source_sha256(src, _sums(source_sha256))
    else:
        assert fused is not None
        with _progress(False, "Comparing") as tick:
            result = api.verify(src, fused, values=values, progress=tick)
    _print(as_json, "verification", result)
    if not result.ok:
        raise typer.Exit(1)


def _sums(given: list[str]) -> str | dict[str, str]:
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [item.rpartition("=") for item in given]
    if any(not name for name, _, _ in pairs):
        raise UsageError("several sums need file names: --source-sha256 FILE=HEX for each")
    return {name: value for name, _, value in pairs}


@app.command()
@_reported
def unfuse(
    fused: Annotated[Path, typer.Argument(help="A fused checkpoint, by whichever tool.")],
    dst: Annotated[Path, typer.Argument(help="Where the original goes.")],
    names: Annotated[
        Names | None,
        typer.Option(
            "--as",
            help="Split what the architecture itself stores fused (phi3, glm4, gpt2, falcon …), "
            "under llama's names, so that LoRA tools find q_proj. A phi3 becomes a llama.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    clone: Clone = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the original checkpoint again: to the byte when fuseweights fused it.

    Example: fuseweights unfuse model-fused.gguf model.gguf

    Example: fuseweights unfuse phi-3-mini phi-3-mini-llama --as llama
    """
    begun = time.perf_counter()
    with _progress(quiet, "Un-fusing") as tick:
        plan = api.unfuse(
            fused, dst, as_llama=names is not None, overwrite=overwrite, clone=clone, progress=tick
        )
    if as_json or not quiet:
        _print(as_json, "unfuse", plan, "restored", time.perf_counter() - begun)


@app.command()
@_reported
def bench(
    ckpt: Annotated[
        Path | None, typer.Argument(help="A Hugging Face directory or a GGUF file, split or fused.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json instead: random weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    cpu_int8: Annotated[
        bool, typer.Option("--cpu-int8", help="Also packed INT8 decoding. It changes numbers.")
    ] = False,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it.")] = None,
) -> None:
    """Time a model unfused and fused: decode, prefill, operations a token.

    Example: fuseweights bench Qwen3-0.6B
    """
    try:
        from .nn.bench import bench as measure
    except ModuleNotFoundError as error:
        raise UsageError(
            f"bench needs {error.name}", hint="pip install 'fuseweights[transformers]'"
        ) from None
    found = measure(
        ckpt,
        model_config=model_config,
        device=device,
        dtype=dtype,
        prompt=prompt,
        new_tokens=new_tokens,
        batch=batch,
        cpu_int8=cpu_int8,
    )
    if plot is not None:
        found.plot(plot)
    if as_json:
        print(found.json())
    else:
        _show(found.table())


def _print(as_json: bool, what: str, *args: object) -> None:
    from . import report

    if as_json:
        name = f"{what}_json"
        print(json.dumps(getattr(report, name)(args[0]), indent=2))
        return
    name = "plan_text" if what == "unfuse" else f"{what}_text"
    _show(getattr(report, name)(*args))


def _show(rendered: object) -> None:
    console = _console(sys.stdout)
    with console.capture() as captured:  # rich itself would end with 1 when the reader is gone
        console.print(rendered)
    print(captured.get(), end="")


@contextmanager
def _executor(scheduler: str | None) -> Iterator[Executor | None]:
    """A Dask cluster's executor; None when no scheduler is named."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise UsageError("--scheduler needs Dask", hint="pip install 'fuseweights[dask]'") from None
    try:
        client = Client(scheduler, timeout="5s")
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {scheduler}: {error}") from None
    with client:
        yield client.get_executor()


@contextmanager
def _progress(off: bool, verb: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, only on a terminal: bytes, rate, time left."""
    if off or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(verb, *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main() -> None:
    """Run the command line; the exit code is the contract's."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = _failed(error)
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: Exception) -> int:
    """One line, the refusals if any, then the hint; returns the exit code."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's own usage errors
        error.show()
        return error.exit_code
    if os.environ.get("FUSEWEIGHTS_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"Error: {printable(str(error) or type(error).__name__)}", file=sys.stderr)
    if isinstance(error, RefusedError) and error.refusals:
        from .report import refusal_table

        _console(sys.stderr).print(refusal_table(error.refusals))
    _print_notes(error)
    if isinstance(error, FuseweightsError):
        if error.hint:
            print(f"Hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if not isinstance(error, OSError | MemoryError):
        print("Hint: a fault of fuseweights; FUSEWEIGHTS_DEBUG=1 shows where.", file=sys.stderr)
    return 4


def _print_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        print(printable(note), file=sys.stderr)


def _console(file: TextIO) -> Console:
    """A terminal's own width; elsewhere wide enough that nothing wraps."""
    from rich.console import Console

    return Console(file=file, highlight=False, width=None if file.isatty() else 240)
