"""State dicts: the fused checkpoint's names, split ones, and one error for everything wrong."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_models import save  # noqa: E402
from nn_models import swap  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights.nn import (  # noqa: E402
    FusedLinear,
    GatedDeltaNet,
    GatedMLP,
    StateDictError,
    load_state,
    split_state,
)

#: Families that our modules run whole, as convert fuses them.
FAMILIES = """llama llama_bias mistral qwen2 qwen3 qwen3_moe qwen2_moe qwen3_next qwen3_5_text
qwen3_5_moe_text gemma2 gemma3_text granite olmo2 smollm3 cohere2 glm4 glm4_moe starcoder2"""


def forget(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


@pytest.mark.parametrize("family", FAMILIES.split())
def test_names_are_the_fused_checkpoints(family, tmp_path):
    """convert's file loads into our modules as it is, the split file too, and the un-fused state
    dict is the split file."""
    source, fused = save(family, tmp_path / "split"), tmp_path / "fused"
    fuseweights.convert(source, fused)
    split, whole = (load_file(path / "model.safetensors") for path in (source, fused))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    ours, _ = swap(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        want = ours(ids).logits
    missing = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    names = ours.state_dict().keys()
    new = whole.keys() - split.keys()
    assert new and new <= names
    # experts' down projections and what an architecture fuses by itself come either way
    known = split_state(ours) | ours.state_dict()
    assert whole.keys() <= known.keys()
    for name, tensor in split.items():
        assert torch.equal(known[name], tensor)
    for state in (whole, split):
        forget(ours)
        # transformers keeps some routers' corrections in float32
        state = {name: tensor.to(known[name].dtype) for name, tensor in state.items()}
        tied = {name: state["model.embed_tokens.weight"] for name in missing}
        load_state(ours, state | tied)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, want)


def attention_and_mlp() -> nn.Module:
    model = nn.Module()
    model.self_attn = nn.Module()
    sections = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    model.self_attn.qkv_proj = FusedLinear(8, sections, bias=True)
    model.mlp = GatedMLP(8, 12)
    return model


def test_everything_wrong_in_one_error_and_nothing_loaded():
    model = attention_and_mlp()
    state = {name: tensor.clone() + 1 for name, tensor in split_state(model).items()}
    state["mlp.gate_up_proj.weight"] = torch.cat(
        [state[f"mlp.{part}_proj.weight"] for part in ("gate", "up")]
    )
    del state["self_attn.v_proj.weight"]
    state["self_attn.q_proj.weight"] = torch.zeros(30, 8)
    state["self_attn.k_proj.weight"] = state["self_attn.k_proj.weight"].half()
    state["self_attn.o_proj.weight"] = torch.zeros(8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateDictError) as error:
        load_state(model, state)
    assert sorted(error.value.problems) == [
        "mlp.gate_proj.weight is given beside mlp.gate_up_proj.weight, which contains it",
        "mlp.up_proj.weight is given beside mlp.gate_up_proj.weight, which contains it",
        "self_attn.k_proj.weight is float16, not float32",
        "self_attn.o_proj.weight has no place",
        "self_attn.q_proj.weight has shape [30, 8], not [32, 8]",
        "self_attn.v_proj.weight is missing",
    ]
    assert str(error.value).startswith("6 problems: ")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_whole_fused_tensor_missing_is_named_once():
    model = attention_and_mlp()
    state = dict(model.state_dict())
    del state["self_attn.qkv_proj.weight"]
    with pytest.raises(StateDictError, match=r"^1 problem: self_attn.qkv_proj.weight is missing$"):
        load_state(model, state)


def test_scales_of_the_whole_layer_must_agree():
    e4m3 = torch.float8_e4m3fn
    parts = {
        name: {"weight": torch.randn(8, 4).to(e4m3), "weight_scale": torch.tensor([0.5])}
        for name in ("gate_proj", "up_proj")
    }
    model = nn.Module()
    model.gate_up_proj = FusedLinear.from_parts(parts)
    state = {k: v.clone() for k, v in split_state(model).items()}
    load_state(model, state)
    state["up_proj.weight_scale"] += 1
    with pytest.raises(StateDictError, match="weight_scale is one for all its parts"):
        load_state(model, state)
    assert model.gate_up_proj.weight_scale.item() == 0.5


def test_meta_modules_are_told_apart():
    with pytest.raises(StateDictError, match="meta device"):
        load_state(GatedMLP(4, 4, device="meta"), {})


@pytest.mark.parametrize("one", [True, False])
def test_delta_net_in_either_fused_form(one):
    """The split names load into four-in-one and two-and-two alike."""
    source = GatedDeltaNet(16, 2, 4, 8, 8, one=not one)
    target = GatedDeltaNet(16, 2, 4, 8, 8, one=one)
    load_state(target, split_state(source))
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(target(x), source(x))
