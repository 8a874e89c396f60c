"""load_state_dict: a split checkpoint straight into fused tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_formats  # noqa: E402
import hf_models  # noqa: E402
from raw_gguf import layer, write  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_patch import build, run  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights.nn.load import load_into, load_state_dict  # noqa: E402
from fuseweights.nn.patch import patch_model  # noqa: E402
from fuseweights.nn.state import StateDictError  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n]))
        for n in a
    )


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3_5", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("shard", [None, "60KB"])
def test_it_is_what_convert_writes(family: str, shard: str | None, tmp_path: Path) -> None:
    source = hf_models.save(family, tmp_path / "source", max_shard_size=shard)
    fuseweights.convert(source, tmp_path / "fused")
    want = hf_formats.load(tmp_path / "fused")
    assert same(load_state_dict(source), want)
    assert same(load_state_dict(tmp_path / "fused"), want)
    assert same(load_state_dict(source, fuse=False), hf_formats.load(source))


@pytest.mark.parametrize("fmt", ["fp8_block", "ct_int4", "ct_nvfp4", "gptq", "awq", "bnb_nf4"])
def test_quantized_formats(fmt: str, tmp_path: Path) -> None:
    library = hf_formats.FORMATS[fmt].library
    if library:
        pytest.importorskip(library.replace("-", "_"))
    source = hf_formats.save(fmt, tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    assert same(load_state_dict(source), hf_formats.load(tmp_path / "fused"))


def test_gguf_blocks_come_as_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gguf", layer(0, dtype="Q4_0", k_width=64))
    state = load_state_dict(source)
    fused = state["blk.0.attn_qkv.weight"]
    assert fused.dtype == torch.uint8 and fused.shape[1] == 64 // 32 * 18
    split = load_state_dict(source, fuse=False)
    parts = [split[f"blk.0.attn_{part}.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), fused)


def test_a_patched_model_takes_it(tmp_path: Path) -> None:
    for family in ("llama", "llama_tied", "qwen3_5_text"):
        source = hf_models.save(family, tmp_path / family, dtype="float32", seed=5)
        cls = getattr(transformers, hf_models.FAMILIES[family].model)
        want = run(cls.from_pretrained(source).eval(), family)
        model = build(family)
        patch_model(model)
        load_into(model, source)
        assert torch.equal(run(model, family), run(model, family))
        assert ((run(model, family) - want).norm() / want.norm()) < 1e-6
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == (family == "llama_tied")


def test_everything_that_does_not_fit_in_one_error(tmp_path: Path) -> None:
    model = build("llama")
    patch_model(model)
    source = hf_models.save("llama", tmp_path / "source", dtype="float32", seed=5)
    state = load_state_dict(source)
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    state[qkv] = state[qkv][:-1]
    state["model.norm.weight"] = state["model.norm.weight"].half()
    state["mystery"] = torch.ones(1)
    del state["model.layers.1.mlp.gate_up_proj.weight"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictError) as caught:
        load_into(model, state)
    assert sorted(caught.value.problems) == [
        "model.layers.0.self_attn.qkv_proj.weight is float32 [127, 64], expected float32 [128, 64]",
        "model.layers.1.mlp.gate_up_proj.weight is missing, expected float32 [192, 64]",
        "model.norm.weight is float16 [64], expected float32 [64]",
        "mystery has no place",
    ]
    assert same(before, model.state_dict())


def test_a_checkpoint_that_lacks_a_part_does_not_fit(tmp_path: Path) -> None:
    """The part's group stays split, so the fused key is missing and the other parts are extra."""
    source = hf_models.save("llama", tmp_path / "source", dtype="float32")
    tensors = hf_formats.load(source)
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors[
        "model.layers.1.mlp.up_proj.weight"
    ].half()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = build("llama")
    patch_model(model)
    with pytest.raises(StateDictError) as caught:
        load_into(model, source)
    problems = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    for name in (
        "0.self_attn.qkv_proj",
        "0.self_attn.v_proj",
        "1.mlp.gate_up_proj",
        "1.mlp.up_proj",
    ):
        assert f"model.layers.{name}.weight" in problems


PEAK = """
import sys, torch
from fuseweights.nn.load import load_state_dict
def memory(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
load_state_dict(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
state = load_state_dict(sys.argv[1])
print((memory("VmHWM") - before) / sum(t.nbytes for t in state.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_peaks_below_a_tenth_more(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=16,
        num_attention_heads=8, num_key_value_heads=4, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    small = hf_models.save("llama", tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(small)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.1
