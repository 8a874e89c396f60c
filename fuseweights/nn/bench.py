"""Unfused against fused, in one process on one set of weights: time a decoded token and a prefill
take, and how many operations and kernels each launches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .patch import PatchReport, patch_model, unpatch_model

SCHEMA = 1
# Operations that only allocate, or look at a tensor in another way.
NO_WORK = {
    "_to_copy", "alias", "as_strided", "chunk", "clone", "contiguous", "detach", "detach_",
    "empty", "empty_like", "empty_strided", "expand", "expand_as", "is_nonzero", "item",
    "lift_fresh", "narrow", "permute", "resize_", "result_type", "resolve_conj", "resolve_neg",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind",
    "unflatten", "unsqueeze", "view", "_has_same_storage_numel", "_local_scalar_dense",
    "_reshape_alias", "_unsafe_view", "reshape",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant. Times are the best of all repeats; `ops` and `kernels` are per decoded token
    (`kernels` counts what the device ran, None on a CPU)."""

    variant: str
    decode_ms: float
    prefill_ms: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    ops: int
    kernels: int | None


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured on what. `left` are the groups that were not fused, with the reason;
    `same_tokens` says whether unfused and fused decode the same greedy tokens (a GGUF file is only
    ever fused)."""

    model: str
    device: str
    dtype: str
    threads: int
    prompt: int
    new_tokens: int
    batch: int
    fused: int
    left: tuple[tuple[str, str], ...]
    note: str | None
    same_tokens: bool
    rows: tuple[Measured, ...]

    def json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table

        title = f"{self.model} · {self.device} · {self.dtype} · batch {self.batch}"
        table = Table(title=title)
        table.add_column("")
        for head in ("decode", "tokens/s", "prefill", "tokens/s", "ops/token", "kernels/token"):
            table.add_column(head, justify="right")
        for row in self.rows:
            table.add_row(
                row.variant,
                f"{row.decode_ms:.3f} ms",
                f"{row.decode_tokens_per_second:.1f}",
                f"{row.prefill_ms:.2f} ms",
                f"{row.prefill_tokens_per_second:.0f}",
                str(row.ops),
                "" if row.kernels is None else str(row.kernels),
            )
        return table

    def plot(self, file: str | PathLike[str]) -> None:
        """Bars of tokens a second and of operations a token. Raises UsageError without
        matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError(
                "--plot needs matplotlib", hint="Install it: pip install matplotlib"
            ) from None
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        names = [row.variant for row in self.rows]
        facts = {
            "decode, tokens/s": [row.decode_tokens_per_second for row in self.rows],
            "prefill, tokens/s": [row.prefill_tokens_per_second for row in self.rows],
            "operations a token": [row.ops for row in self.rows],
        }
        for axes, (title, values) in zip(figure.subplots(1, 3), facts.items(), strict=True):
            axes.bar_label(axes.bar(names, values), fmt="%.4g")
            axes.set_title(title)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.model} · {self.device} · {self.dtype} · batch {self.batch}")
        figure.savefig(file)


def bench(
    checkpoint: str | PathLike[str] | None = None,
    *,
    model_config: str | PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str = "bfloat16",
    prompt: int = 128,
    new_tokens: int = 16,
    batch: int = 1,
    repeats: int = 3,
    cpu_int8: bool = False,
    decoder: bool | None = None,
) -> Bench:
    """Measure a checkpoint, split or fused, or a config.json with random weights.

    Variants take turns, so that a machine that warms up or is shared favours none. `decoder` adds
    nn.Decoder, which knows some architectures: on a GPU unless told otherwise.
    """
    if (checkpoint is None) == (model_config is None):
        raise UsageError("give a checkpoint or a model config, one of them")
    model = _load(checkpoint, model_config, getattr(torch, dtype)).to(device).eval()
    size = getattr(model.config.get_text_config(), "vocab_size", 2)
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (batch, prompt), generator=seed).to(device)
    gguf = str(checkpoint).endswith(".gguf")  # fused while it is loaded
    variants: dict[str, tuple[Callable[[], PatchReport], Callable[[], Any]]] = {
        "unfused": (lambda: unpatch_model(model), lambda: _Stock(model)),
        "fused": (lambda: patch_model(model), lambda: _Stock(model)),
    }
    if gguf:
        del variants["unfused"]
    if cpu_int8:
        variants["fused, int8"] = lambda: patch_model(model, cpu_int8=True), lambda: _Stock(model)
    if decoder or (decoder is None and ids.is_cuda):
        length = prompt + new_tokens + 1
        variants["decoder"] = lambda: patch_model(model), lambda: _Decoding(model, batch, length)
    best: dict[str, list[float]] = {}
    counts, tokens, reports, notes = {}, {}, {}, []
    for _ in range(repeats):
        for name, (enter, start) in list(variants.items()):
            reports[name] = enter()
            try:
                run = start()
            except UsageError as error:
                del variants[name]
                notes.append(f"{name}: {error}")
                continue
            prefill, decode, tokens[name] = _run(run, ids, new_tokens)
            known = best.setdefault(name, [prefill, decode])
            best[name] = [min(known[0], prefill), min(known[1], decode)]
            if name not in counts:
                counts[name] = _count(run, ids)
            del run
    rows = tuple(
        Measured(
            name,
            1e3 * decode,
            1e3 * prefill,
            batch / decode,
            batch * prompt / prefill,
            *counts[name],
        )
        for name, (prefill, decode) in best.items()
    )
    return Bench(
        model=Path(checkpoint or model_config or "").resolve().name,
        device=_device_name(device),
        dtype=dtype,
        threads=torch.get_num_threads(),
        prompt=prompt,
        new_tokens=new_tokens,
        batch=batch,
        fused=_stacks(model) if gguf else len(reports["fused"].fused),
        left=tuple(sorted({(r.group, r.reason) for r in reports["fused"].left})),
        note="; ".join([*filter(None, (r.note for r in reports.values())), *notes]) or None,
        same_tokens=gguf or torch.equal(tokens["unfused"], tokens["fused"]),
        rows=rows,
    )


def _load(checkpoint: Any, model_config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from . import door

    door.install()
    if str(checkpoint).endswith(".gguf"):
        from .gguf_model import load_model

        return load_model(checkpoint, dtype=dtype)
    if checkpoint is not None:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_config), dtype=dtype)


def _stacks(model: nn.Module) -> int:
    """Layers that hold several parts."""
    from .linear import FusedLinear

    return sum(isinstance(m, FusedLinear) and len(m.sections) > 1 for m in model.modules())


class _Stock:
    """transformers' own forward, with its cache."""

    def __init__(self, model: nn.Module):
        self.model, self.cache = model, None

    def start(self, ids: Tensor) -> Tensor:
        self.cache = None
        return self.next(ids)

    def next(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[:, -1]


class _Decoding:
    """The Decoder, with its own."""

    def __init__(self, model: nn.Module, batch: int, max_length: int):
        from .decode import Decoder

        self.decoder = Decoder(model, batch, max_length)

    def start(self, ids: Tensor) -> Tensor:
        self.decoder.reset()
        return self.decoder.prefill(ids)

    def next(self, ids: Tensor) -> Tensor:
        return self.decoder.step(ids[:, 0])


@torch.no_grad()
def _run(run: _Stock | _Decoding, ids: Tensor, new_tokens: int) -> tuple[float, float, Tensor]:
    """Seconds for the prefill, the least seconds for a token, and the tokens."""
    run.start(ids[:, :4])  # warm up
    _settle(ids)
    start = time.perf_counter()
    logits = run.start(ids)
    _settle(ids)
    prefill, decode, tokens = time.perf_counter() - start, float("inf"), []
    for _ in range(new_tokens):
        tokens.append(logits.argmax(-1, keepdim=True))
        _settle(ids)
        start = time.perf_counter()
        logits = run.next(tokens[-1])
        _settle(ids)
        decode = min(decode, time.perf_counter() - start)
    return prefill, decode, torch.cat(tokens, 1)


def _settle(like: Tensor) -> None:
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)


@torch.no_grad()
def _count(run: _Stock | _Decoding, ids: Tensor) -> tuple[int, int | None]:
    """Operations that compute something for one decoded token, and kernels that the device ran."""
    from torch.profiler import ProfilerActivity, profile

    token = run.start(ids).argmax(-1, keepdim=True)
    activities = [ProfilerActivity.CPU]
    on_gpu = ids.device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as prof:
        run.next(token)
        _settle(ids)
    events = prof.events()
    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    calls = [e for e in on_cpu if "::" in e.name and e.name.partition("::")[2] not in NO_WORK]
    outer: set[int] = set()  # those that leave the work to another
    for call in calls:
        while (call := call.cpu_parent) is not None:
            outer.add(id(call))
    ops = sum(id(call) not in outer for call in calls)
    copies = ("Memcpy", "Memset")
    ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return ops, sum(not e.name.startswith(copies) for e in ran) if on_gpu else None


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return device
