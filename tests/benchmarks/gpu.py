"""Timing on a GPU: graph replays, the median of them, with inputs that the L2 cache has forgotten.

`microseconds(call, sets)` captures one graph of call(sets[0]), call(sets[1]), … and times its
replays; make enough sets that one round of them moves at least `COLD` bytes, so that weights come
from memory every time. A lone launch is then measured with the gap that follows it in a graph,
which is what a decoding step pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

T = TypeVar("T")

#: Four times the 60 MB L2 of an H200.
COLD = 240 << 20


def rotated(make: Callable[[], T], bytes_each: int, most: int = 512) -> list[T]:
    """Enough copies of what `make` allocates that a round of them does not fit into L2."""
    return [make() for _ in range(max(2, min(most, -(-COLD // bytes_each))))]


def microseconds(
    call: Callable[[Any], Any], sets: Sequence[Any], launches: int = 200, rounds: int = 9
) -> float:
    """Median time of one call, over `rounds` replays of a graph of about `launches` calls."""
    repeats = max(1, launches // len(sets))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for given in sets[:3]:
            call(given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for given in sets:
                call(given)
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (repeats * len(sets)))
    return median(times)


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out − exact‖ / ‖exact‖ in float64; NaN and infinity never pass a comparison with it."""
    out, exact = out.double(), exact.double()
    return float((out - exact).norm() / exact.norm())
