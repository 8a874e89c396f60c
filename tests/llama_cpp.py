"""Run a GGUF file in stock llama.cpp, in a process of its own: a crash there is a result here.

`python llama_cpp.py FILE PROMPT N CACHE` is the child: it prints the run as one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MARK = "RUN:"


class LoadFailed(Exception):
    """llama.cpp refused the file or crashed; the text is what it said last."""


@dataclass(frozen=True)
class Run:
    """`tokens` generated greedily; for each, the log-probability of every listed token id."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def run(path: Path, prompt: list[int], n: int = 8, timeout: float = 120, cache: str = "F16") -> Run:
    """Generate n tokens for a prompt of token ids, with the log-probabilities of the vocabulary.
    `cache`: the type of the cached keys and values."""
    command = [sys.executable, __file__, str(path), json.dumps(prompt), str(n), cache]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, errors="replace"
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            tokens, logprobs = json.loads(line.removeprefix(MARK))
            return Run(tokens, [dict(at) for at in logprobs])
    raise LoadFailed(f"exit code {done.returncode}: {_reason(done.stdout + done.stderr)}")


def _reason(log: str) -> str:
    """The errors in llama.cpp's log without their time stamps, or its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.partition(" E ")[2] for line in lines if " E " in line]
    asserts = [line for line in lines if "GGML_ASSERT" in line]
    return " | ".join((asserts or errors or lines[-3:])[:3])


def _child(path: str, prompt: list[int], n: int, cache: str) -> None:
    """Load and run in this process: one thread, greedy, everything that may vary switched off."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")
    params.cache_type_v = params.cache_type_k
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    params.ui = False
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.n_threads_http = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.sampling.seed = 1
    server = xllamacpp.Server(params)
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": n, "temperature": 0.0, "n_probs": 100_000,
        "ignore_eos": True, "cache_prompt": False, "return_tokens": True, "seed": 1,
    })  # fmt: skip
    steps = answer["choices"][0]["logprobs"]["content"]
    if len(steps) != n:  # a token that ends inside a character is withheld
        raise SystemExit(f"error: {len(steps)} of {n} tokens came back")
    tokens = [step["id"] for step in steps]
    logprobs = [[(at["id"], at["logprob"]) for at in step["top_logprobs"]] for step in steps]
    print(f"\n{MARK}{json.dumps([tokens, logprobs])}", flush=True)


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
