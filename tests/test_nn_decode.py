"""The Decoder against transformers' own generate, on the CPU: the same steps as on a GPU, through
the operations' plain PyTorch references."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gguf_models  # noqa: E402
import hf_models  # noqa: E402
from nn_models import SLIDING, build, distance, swap  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights import UsageError  # noqa: E402
from fuseweights.nn import Decoder  # noqa: E402
from fuseweights.nn.decode import DECODERS  # noqa: E402

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
#: Families of hf_models whose text model has another model_type, or a variation of a row's layers.
MORE = ["llama_bias", "llama_tied", "qwen3_5", "qwen3_5_moe", "gemma3"]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(1))


def generate(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, **GREEDY)


@pytest.mark.parametrize("family", [*DECODERS, *MORE])
def test_greedy_tokens(family):
    model, ids = build(family, torch.float32), tokens(2, 7)
    wanted = generate(model, ids, 12)
    decoder = Decoder(model, batch=2, max_length=18)
    assert torch.equal(decoder.generate(ids, 12), wanted)
    assert torch.equal(decoder.generate(ids, 12), wanted)  # nothing is left of the first time
    assert torch.equal(generate(model, ids, 12), wanted)  # and the model still works


@pytest.mark.parametrize("family", DECODERS)
def test_logits_in_pieces(family):
    """Prefills onto a filled cache, and steps, in any order, as the same modules compute at once
    (which test_nn_models compares with transformers)."""
    model, ids = build(family), tokens(1, 20)
    with torch.no_grad():
        exact = swap(model)[0](ids).logits[0]
    decoder = Decoder(model, max_length=20)
    found, ends, at = [], [], 0
    for size in (1, 6, 1, 1, 5, 2, 1, 3):
        piece = ids[:, at : at + size]
        found.append(decoder.step(piece[:, 0]) if size == 1 and at else decoder.prefill(piece))
        ends.append(at := at + size)
    assert distance(torch.cat(found), exact[[end - 1 for end in ends]]) <= 1e-12
    assert at == decoder.length == 20 and torch.equal(decoder.tokens[:, :20], ids)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gemma3_text"])
def test_sliding_window(family):
    model = build(family, **{"sliding_window": 5, **(SLIDING if family == "qwen3" else {})})
    ids = tokens(1, 16)
    with torch.no_grad():
        exact = model(ids).logits[0]
    decoder = Decoder(model, max_length=16)
    found = [decoder.prefill(ids[:, :9]), decoder.prefill(ids[:, 9:12])]
    found += [decoder.step(ids[:, at]) for at in range(12, 16)]
    assert distance(torch.cat(found), exact[[8, 11, 12, 13, 14, 15]]) <= 1e-6


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_text"])
def test_a_fused_checkpoint(family, tmp_path):
    source = hf_models.save(family, tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    auto = transformers.AutoModelForCausalLM
    split, fused = (auto.from_pretrained(tmp_path / n).float() for n in ("source", "fused"))
    ids = tokens(1, 6)
    wanted = generate(split, ids, 8)
    for model in (split, fused):
        assert torch.equal(Decoder(model, max_length=16).generate(ids, 8), wanted)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "qwen3_5_moe_text"])
def test_weights_are_the_models_own(family):
    """Only the caches are new: the Decoder holds no second copy of a weight."""
    model = build(family, torch.float32)
    decoder = Decoder(model, max_length=16)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for layer in decoder.layers:
        mixer = getattr(layer.mixer, "attention", None) or layer.mixer.mixer
        for name, parameter in mixer.named_parameters():
            assert parameter.untyped_storage().data_ptr() in storages, name
        block = getattr(layer.mlp, "moe", None) or layer.mlp.gate_up
        for name, parameter in block.named_parameters():
            assert parameter.untyped_storage().data_ptr() in storages, name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe_text"])
def test_bfloat16_is_no_further_from_the_truth(family):
    """A step's logits against float64's, every expert in use: with fewer, one rounding more or less
    picks another one."""
    every = {"num_experts_per_tok": 4} if "moe" in family else {}
    errors = {"mine": [], "theirs": []}
    ids = tokens(4, 13)
    for seed in range(3):
        model = build(family, seed=seed, **every)
        with torch.no_grad():
            exact = model(ids).logits[:, 6:]
            narrow = copy.deepcopy(model).bfloat16()
            theirs = narrow(ids).logits[:, 6:]
        decoder = Decoder(narrow, batch=4, max_length=13)
        steps = [decoder.prefill(ids[:, :7]), *(decoder.step(ids[:, at]) for at in range(7, 13))]
        for who, logits in (("mine", torch.stack(steps, 1)), ("theirs", theirs)):
            wrong = logits.double() - exact
            errors[who].append((wrong.norm(dim=-1) / exact.norm(dim=-1)).flatten())
    mine, theirs = (torch.cat(found) for found in errors.values())
    assert mine.median() <= 1.1 * theirs.median()
    assert mine.log().mean() <= theirs.log().mean() + 0.1


class FP8Linear(torch.nn.Module):
    """A quantized layer as transformers has it, computed through its numbers."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        rows, columns = layer.weight.shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        weight = layer.weight.detach().to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = self.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
        rows, columns = self.weight.shape
        return x @ (self.weight.float() * spread[:rows, :columns]).T


def test_fp8_layers():
    model, ids = build("qwen3", torch.float32), tokens(1, 9)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, FP8Linear(child))
    with torch.no_grad():
        exact = model(ids).logits[0]
    decoder = Decoder(model, max_length=9)
    found = [decoder.prefill(ids[:, :7]), decoder.step(ids[:, 7]), decoder.step(ids[:, 8])]
    assert distance(torch.cat(found), exact[6:]) <= 1e-5
    layer = decoder.layers[0]
    products = layer.mixer.attention.qkv_proj, layer.mixer.out_proj, layer.mlp.gate_up
    assert {type(product.format).__name__ for product in products} == {"Scaled"}


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "qwen3moe", "qwen35", "qwen35moe"])
def test_a_gguf_file(architecture, tmp_path):
    """Layers that hold blocks of several types, experts and tiled value heads among them."""
    path = gguf_models.build(architecture, tmp_path / "model.gguf", "Q4_K_M")
    model, ids = fuseweights.load_model(path), tokens(1, 7)
    wanted = generate(model, ids, 8)
    assert torch.equal(Decoder(model, max_length=16).generate(ids, 8), wanted)


def test_ends_with_eos():
    model, ids = build("qwen3", torch.float32), tokens(1, 4)
    decoder = Decoder(model, max_length=200)
    whole = decoder.generate(ids, 150)
    eos = int(whole[0, 40])
    cut = decoder.generate(ids, 150, eos=eos)
    assert torch.equal(cut, whole[:, : cut.shape[1]]) and eos in cut[0, 4:]
    assert cut.shape[1] - 4 == 32 * -(-(whole[0, 4:].tolist().index(eos) + 1) // 32)
    assert decoder.generate(ids, 150, eos=-1).shape == whole.shape


@pytest.mark.parametrize("family", ["gpt2", "cohere2", "gpt_oss", "bert"])
def test_an_architecture_that_it_does_not_know(family):
    with pytest.raises(UsageError, match="does not know"):
        Decoder(build(family, torch.float32), max_length=16)


def test_rope_that_changes_with_the_length():
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match="dynamic RoPE"):
        Decoder(build("llama", torch.float32, rope_parameters=scaled), max_length=16)


def test_more_tokens_than_there_is_room():
    model, ids = build("llama", torch.float32), tokens(1, 6)
    decoder = Decoder(model, max_length=8)
    with pytest.raises(UsageError, match="6 \\+ 4 tokens are more than max_length = 8"):
        decoder.generate(ids, 4)
    assert torch.equal(decoder.generate(ids, 0), ids)
    assert decoder.generate(ids, 3).shape == (1, 9)
    with pytest.raises(UsageError, match="9 tokens are more"):
        decoder.step(ids[:, 0])
    with pytest.raises(UsageError, match="14 tokens are more"):
        decoder.prefill(ids)
    for wrong in (ids[0], tokens(2, 3), ids[:, :0]):
        with pytest.raises(UsageError, match=r"expected tokens \[1, 1 or more\]"):
            decoder.prefill(wrong)
