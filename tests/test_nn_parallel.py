"""Tensor parallelism on the CPU: 2 and 4 gloo processes against one."""

from __future__ import annotations

import multiprocessing

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import nn_workers  # noqa: E402
from torch.multiprocessing import start_processes  # noqa: E402

HEADS = {"num_attention_heads": 8, "head_dim": 8}
GDN = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
MODELS = [
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    ("llama_bias", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    ("qwen3_moe", HEADS),
    ("qwen3_next", HEADS | GDN),
    ("qwen3_5_moe_text", HEADS | GDN),
    ("gpt_oss", HEADS),
    ("phi3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
]


#: Imported once, by the server that the processes are forked from.
PRELOAD = [
    *("torch.distributed.tensor.parallel", "transformers.generation.utils"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3_5_moe", "phi3")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen3_next", "gpt_oss")),
]


def spawn(world: int, tmp_path, task: str, *args) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    given = (world, str(tmp_path / "rendezvous"), task, *args)
    start_processes(nn_workers.run, given, nprocs=world, start_method="forkserver")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family, changes", MODELS, ids=[m[0] for m in MODELS])
def test_a_sharded_model_equals_the_whole(family, changes, world, tmp_path):
    spawn(world, tmp_path, "whole_model", family, changes)


@pytest.mark.parametrize("world", [2, 4])
def test_as_a_style_of_parallelize_module(world, tmp_path):
    spawn(world, tmp_path, "fused_linear")


def test_all_or_nothing(tmp_path):
    spawn(2, tmp_path, "refused")
