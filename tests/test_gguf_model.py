"""A GGUF file as a transformers model: its numbers are those of stock llama.cpp on the same file.

llama.cpp multiplies quantized weights with activations that it has quantized too (Q8_0, Q8_K), and
looks GELU up in a table of float16. The first is taken out by giving it the dequantized twin of a
file, the second by giving our model the same table; what is left is the order of float32 sums.
"""

from __future__ import annotations

from unittest import mock

import gguf
import gguf_models
import llama_cpp
import pytest
import torch
import torch.nn.functional as F
from gguf.quants import dequantize

import fuseweights
from fuseweights import UsageError, load_model
from fuseweights.nn import FusedLinear, ops
from fuseweights.nn.blocks import MixedLinear
from fuseweights.nn.gguf_config import read_config
from fuseweights.nn.weights import GGUFBlocks

# With GELU the last bit of a sum picks one of two neighbours in the table of float16.
BOUND = {"gemma3": 1e-3, "gemma4": 4e-3, "gemma4-moe": 4e-3, "gemma4-shared": 4e-3}
DENSE = ["llama", "qwen2", "qwen3", "gemma3", "qwen35", "qwen35-mtp"]
ARCHITECTURES = [*DENSE, "qwen3moe", "gemma4", "gemma4-shared", "gemma4-moe", "qwen35moe"]
QUICK = {"llama", "qwen35moe"}
PROMPT = [5, 17, 200, 33, 91, 140, 7]
NEW = 8


def table_gelu(x):
    """ggml's GELU on a CPU (GGML_GELU_FP16)."""
    return F.gelu(x.half().float(), approximate="tanh").half().float()


def greedy(model, prompt=PROMPT):
    """Tokens, and the log-probabilities [NEW, vocabulary] of each."""
    with torch.no_grad(), mock.patch.dict(ops.ACTIVATIONS, gelu_tanh=table_gelu):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0].log_softmax(-1)


def worst(logprobs, run, steps=NEW):
    """The largest difference over the first `steps` positions."""
    pairs = zip(logprobs[:steps], run.logprobs, strict=False)
    return max(abs(ours[token].item() - p) for ours, at in pairs for token, p in at.items())


def twin(source, arch, target):
    """The same model with every weight dequantized."""
    reader = gguf.GGUFReader(source)
    values = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return gguf_models.build(arch, target, "F32", values=values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_files_give_llama_cpps_tokens(tmp_path, architecture):
    path = gguf_models.build(architecture, tmp_path / "model.gguf", "F32")
    theirs = llama_cpp.run(path, PROMPT, NEW, cache="F32")
    tokens, logprobs = greedy(load_model(path))
    assert tokens == theirs.tokens
    assert worst(logprobs, theirs) < BOUND.get(architecture, 5e-5)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=pytest.mark.slow if a not in QUICK else ()) for a in ARCHITECTURES],
)
def test_quantized_files_give_the_tokens_of_their_exact_numbers(tmp_path, architecture):
    path = gguf_models.build(architecture, tmp_path / "model.gguf", "Q4_K_M")
    dequantized = twin(path, architecture, tmp_path / "twin.gguf")
    exact = llama_cpp.run(dequantized, PROMPT, NEW, cache="F32")
    tokens, logprobs = greedy(load_model(path))
    assert tokens == exact.tokens
    assert worst(logprobs, exact) < BOUND.get(architecture, 5e-5)

    # On the file itself llama.cpp rounds its activations: where it parts from us, it parts from
    # its own run of the exact numbers, at the same token.
    rounded = llama_cpp.run(path, PROMPT, NEW, cache="F32")
    first = [a == b for a, b in zip(tokens, rounded.tokens, strict=True)] + [False]
    assert first.index(False) == [
        *(a == b for a, b in zip(exact.tokens, rounded.tokens, strict=True)), False
    ].index(False)  # fmt: skip


@pytest.mark.parametrize("consumer", ["torch", "llama.cpp"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen35moe", "gemma4-moe"])
def test_fused_files_load_alike(tmp_path, architecture, consumer):
    path = gguf_models.build(architecture, tmp_path / "model.gguf", "Q4_K_M")
    fused = tmp_path / "fused.gguf"
    fuseweights.convert(path, fused, consumer=consumer)
    want, want_logprobs = greedy(load_model(path))
    tokens, logprobs = greedy(load_model(fused))
    assert tokens == want
    assert torch.equal(logprobs, want_logprobs)


def test_every_weight_stays_the_block_that_it_was(tmp_path):
    """Stacked where types agree; v of Q4_K_M is wider in some layers, and stands alone there."""
    path = gguf_models.build(
        "qwen3", tmp_path / "m.gguf", "Q4_K", types={"blk.1.attn_v.weight": "Q6_K"}
    )
    model = load_model(path)
    raw = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}
    first, second = (layer.self_attn.qkv_proj for layer in model.model.layers)
    assert isinstance(first, FusedLinear) and isinstance(second, MixedLinear)
    assert first.format == GGUFBlocks(gguf.GGMLQuantizationType.Q4_K)
    parts = [f"blk.0.attn_{p}.weight" for p in "qkv"]
    assert torch.equal(first.weight, torch.cat([raw[p] for p in parts]))
    parts = [f"blk.1.attn_{p}.weight" for p in "qk"]
    assert torch.equal(second.stacks[0].weight, torch.cat([raw[p] for p in parts]))
    assert torch.equal(second.stacks[1].weight, raw["blk.1.attn_v.weight"])
    assert torch.equal(model.model.embed_tokens.weight, raw["token_embd.weight"])
    assert torch.equal(model.lm_head.weight, raw["output.weight"])
    assert not any(isinstance(m, torch.nn.Linear | torch.nn.Embedding) for m in model.modules())


def test_split_sets_load_from_any_of_their_files(tmp_path):
    from test_llama_cpp import _split

    path = gguf_models.build("qwen3", tmp_path / "model.gguf", "Q4_K")
    files = _split(path, tmp_path, 3)
    files = sorted(tmp_path.glob("*-of-*.gguf"))
    assert len(files) == 3
    want = greedy(load_model(path))[1]
    assert torch.equal(greedy(load_model(files[1]))[1], want)


def test_tied_output_is_the_table_itself(tmp_path):
    model = load_model(gguf_models.build("gemma3", tmp_path / "m.gguf", "Q4_K"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_configuration_is_what_transformers_reads(tmp_path):
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.integrations.gguf import read_gguf_metadata as read
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    for architecture in ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "qwen35", "qwen35moe"):
        path = gguf_models.build(architecture, tmp_path / f"{architecture}.gguf", "F32")
        if architecture in GGUF_CONFIG_ARCHS:
            theirs = get_gguf_config(*read(str(path)))
        else:
            theirs = load_gguf_checkpoint(str(path))["config"]
        ours = read_config(fuseweights.open_checkpoint(path))
        theirs.pop("_model_name_or_path", None)
        if (theta := theirs.pop("rope_theta", None)) is not None:
            rope = ours.rope_parameters
            assert rope.get("full_attention", rope)["rope_theta"] == theta
        differ = {
            key: (value, found)
            for key, value in theirs.items()
            if (found := getattr(ours, key, None)) != value
        }
        if rope := differ.pop("rope_parameters", None):  # theirs leaves out what is text alone
            assert rope[0].items() <= rope[1].items(), architecture
        known = {"architectures", "unk_token_id", "full_attention_interval"}  # layer_types says it
        assert differ.keys() <= known, (architecture, differ)


def test_what_has_no_place_and_what_is_missing_are_listed_at_once(tmp_path):
    whole = gguf_models.build("qwen3", tmp_path / "whole.gguf", "F32")
    extra = torch.zeros(4).numpy()
    path = gguf_models.build(
        "qwen3", tmp_path / "m.gguf", "F32",
        values={"blk.0.surprise.weight": extra, "blk.1.another.weight": extra},
    )  # fmt: skip
    load_model(whole)
    with pytest.raises(UsageError, match=r"blk\.0\.surprise.*blk\.1\.another.* no place"):
        load_model(path)


def test_a_missing_tensor_is_named(tmp_path, monkeypatch):
    arch = gguf_models.ARCHS["qwen3"]
    layer = {k: v for k, v in arch.layers[0].items() if "ffn_down" not in k}
    monkeypatch.setitem(
        gguf_models.ARCHS, "qwen3", gguf_models.Arch((arch.layers[0], layer), arch.hparams)
    )
    path = gguf_models.build("qwen3", tmp_path / "m.gguf", "F32")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj\.weight is not in the file"):
        load_model(path)


def test_other_architectures_and_directories_are_refused(tmp_path):
    path = gguf_models.build("phi3", tmp_path / "m.gguf", "F32")
    with pytest.raises(UsageError, match=r"'phi3'.*llama, qwen2"):
        load_model(path)


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0", "Q4_0"])
def test_planar_order_is_the_same_bytes(kind):
    """What a GPU holds in place of some types' blocks: the same numbers, and the way back."""
    import numpy as np

    values = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    blocks = torch.from_numpy(gguf_models.quantize(values, kind))
    format = GGUFBlocks(int(gguf.GGMLQuantizationType[kind]))
    planar, moved = format.planar(blocks)
    assert planar.is_planar and not torch.equal(moved[..., : blocks.shape[-1]], blocks)
    assert torch.equal(planar.raw(moved), blocks)
    want = format.dequantize({"weight": blocks}, torch.float32)
    assert torch.equal(planar.dequantize({"weight": moved}, torch.float32), want)
