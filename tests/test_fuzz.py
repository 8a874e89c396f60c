"""What fuzzing found interesting, and fresh damage: every input works or is refused by one of our
errors, in bounded time and memory (tests/fuzz/targets.py says what else)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.append(str(FUZZ))

import targets  # noqa: E402

CORPUS = sorted((FUZZ / "corpus").rglob("*.bin"))


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_convert_and_come_back(name, monkeypatch):
    """The search starts from inputs that work: else it would only ever see refusals."""
    done, attempt = [], targets._attempt
    monkeypatch.setattr(targets, "_attempt", lambda verb: done.append(attempt(verb)) or done[-1])
    for seed in targets.seeds()[name]:
        targets.run(targets.TARGETS[name], seed)
    assert done and all(done)


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_corpus(path):
    targets.run(targets.TARGETS[path.parent.name], path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_fresh_damage(name):
    """Seeds with a few bytes changed, dropped or repeated: another 100 on each day's code."""
    rng = random.Random(name)
    for seed in targets.seeds()[name] * 25:
        data = bytearray(seed)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(data), 1200))
            end = at + rng.randint(0, 9)
            data[at:end] = rng.choice((rng.randbytes(end - at), b"", data[at:end] * 2, b"\xff" * 8))
        targets.run(targets.TARGETS[name], bytes(data[: 1 << 14]))
