"""The doors into transformers: fused directories, fused while loading, and back to the byte."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_formats  # noqa: E402
import hf_models  # noqa: E402
from test_patch import FAMILIES, error, run  # noqa: E402
from torch import nn  # noqa: E402

import fuseweights  # noqa: E402
from fuseweights.nn import door  # noqa: E402
from fuseweights.nn.patch import fused_in, patch_model, unpatch_model  # noqa: E402

FUSE = {"fusion_config": {"fuseweights": True}}
#: Nothing to fuse: fused by themselves, or their parts have not all a bias.
ALREADY = {"phi3", "gpt2", "falcon", "gpt_neox", "bloom", "whisper"}
#: One of every kind; transformers takes seconds a family, and the others are slow for that reason.
QUICK = {"llama", "qwen3_moe", "qwen3_5", "gemma3", "deepseek_v3", "gpt_oss", "bert", "vit"}
QUANTIZED = ["fp8_block", "fp8_tensor", "ct_fp8_channel", "ct_int8_channel", "ct_int4", "bnb_nf4"]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    threads, level = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    door.install()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(level)


@pytest.fixture(autouse=True)
def few_patches() -> Iterator[None]:
    """transformers tries every class that was ever patched on every name it knows."""
    yield
    transformers.monkey_patching.clear_patch_mapping()


def load(family: str, path: Path, **options) -> nn.Module:
    """The model, of which the checkpoint had every tensor."""
    cls = getattr(transformers, hf_models.FAMILIES[family].model)
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    unexpected = {k for k in info.pop("unexpected_keys") if "mtp" not in family}
    assert not any(info.values()) and not unexpected, (info, unexpected)
    return model.eval()


def differ(a: Path, b: Path) -> set[str]:
    """Names of files that are not in both directories with the same bytes."""
    names = {path.name for path in (*a.iterdir(), *b.iterdir())}

    def read(path: Path) -> bytes | None:
        return path.read_bytes() if path.exists() else None

    return {name for name in names if read(a / name) != read(b / name)}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return hf_formats.load(path)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
        for family in FAMILIES
        if family not in ALREADY
    ],
)
def test_the_full_road(family: str, tmp_path: Path) -> None:
    """save_pretrained → convert → from_pretrained → the same logits → save_pretrained → unfuse →
    the first, to the byte; every other way in and out beside it."""
    source = hf_models.save(family, tmp_path / "source", dtype="float32")
    plain = load(family, source)
    want = run(plain, family)
    plain.save_pretrained(tmp_path / "first")
    plan = fuseweights.convert(source, tmp_path / "fused")
    model = load(family, tmp_path / "fused")
    modules = {p.name for p in fused_in(model)}
    for group in plan.groups:  # experts are the model's own form, MTP layers are not loaded
        if group.group != "experts" and "mtp" not in family and family != "vit":
            name = group.tensors[0].name.removesuffix(".weight")
            assert any(name.endswith(m) or m.endswith(name.split(".", 1)[1]) for m in modules), name
    got = run(model, family)
    assert error(got, want) < 1e-5

    # the fused form, with its manifest, and the split one: both exactly the first in the end
    door.save_pretrained(model, tmp_path / "again", fused=True)
    fuseweights.unfuse(tmp_path / "again", tmp_path / "back")
    assert not differ(tmp_path / "back", tmp_path / "first")
    door.save_pretrained(model, tmp_path / "split")
    assert not differ(tmp_path / "split", tmp_path / "first")

    # transformers' own save_pretrained, in its two forms
    model.save_pretrained(tmp_path / "default")
    again = load(family, tmp_path / "default")
    assert list(fused_in(again)), "its config still says to fuse"
    assert error(run(again, family), got) < 1e-6
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert any("_proj" in n and n not in tensors_of(source) for n in tensors_of(tmp_path / "own"))
    assert error(run(load(family, tmp_path / "own"), family), got) < 1e-6

    # a split directory after a fused one is split, and one may be fused while it loads
    after = load(family, source)
    assert not list(fused_in(after)) and error(run(after, family), want) < 1e-6
    after.save_pretrained(tmp_path / "after")
    assert not differ(tmp_path / "after", tmp_path / "first")
    while_loading = load(family, source, **FUSE)
    assert {p.name for p in fused_in(while_loading)} == modules
    assert error(run(while_loading, family), got) < 1e-6
    while_loading.save_pretrained(tmp_path / "while")
    assert differ(tmp_path / "while", tmp_path / "first") == {"config.json"}

    unpatch_model(model)
    assert not list(fused_in(model)) and error(run(model, family), want) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_5", "gemma4_text", "bert"])
def test_patched_models_save_what_they_would_unpatched(family: str, tmp_path: Path) -> None:
    source = hf_models.save(family, tmp_path / "source")
    for name, model in {
        "loaded": load(family, source),
        "built": hf_models._build(hf_models.FAMILIES[family], torch.bfloat16),
    }.items():
        model.save_pretrained(tmp_path / f"{name}-before")
        patch_model(model)
        model.save_pretrained(tmp_path / f"{name}-patched")
        inner = model.base_model
        inner.save_pretrained(tmp_path / f"{name}-inner")
        assert not any("qkv_proj" in n for n in tensors_of(tmp_path / f"{name}-inner"))
        unpatch_model(model)
        model.save_pretrained(tmp_path / f"{name}-after")
        for form in ("patched", "after"):
            assert not differ(tmp_path / f"{name}-before", tmp_path / f"{name}-{form}")


def test_grouped_query_attention_is_not_cut_in_thirds(tmp_path: Path) -> None:
    source = hf_models.save("qwen3", tmp_path / "source")
    load("qwen3", source, **FUSE).save_pretrained(tmp_path / "saved")
    before, after = tensors_of(source), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert before["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantized_directories(fmt: str, tmp_path: Path) -> None:
    library = hf_formats.FORMATS[fmt].library
    if library:
        pytest.importorskip(library.replace("-", "_"))
    ids = torch.randint(3, 30, (1, 6))
    knobs: list[dict] = [{}]
    if not fmt.startswith("bnb"):
        knobs += [{"unquantized": "v_proj"}, {"unquantized": "up_proj"}]
    if fmt == "fp8_block":
        knobs += [{"ragged": True}]
    for number, knob in enumerate(knobs):
        source, fused = tmp_path / f"{number}", tmp_path / f"{number}f"
        hf_formats.save(fmt, source, **knob)
        plan = fuseweights.convert(source, fused)
        auto = transformers.AutoModelForCausalLM
        a, _ = auto.from_pretrained(source, output_loading_info=True)
        b, info = auto.from_pretrained(fused, output_loading_info=True)
        assert not any(info.values()), info
        assert {(p.group, p.layer) for p in fused_in(b)} == {
            (g.group, g.layer) for g in plan.groups
        }
        want = a.eval()(ids).logits
        assert torch.equal(b.eval()(ids).logits, want)
        # it is not fused while loading, because some of it may not stack; and it still loads
        c, info = auto.from_pretrained(source, output_loading_info=True, **FUSE)
        assert not any(info.values()) and torch.equal(c.eval()(ids).logits, want)


def test_other_groups_than_the_usual(tmp_path: Path) -> None:
    """qkvz and ba fused on disk where all four would have gone together."""
    family = "qwen3_5_text"
    source = hf_models.save(family, tmp_path / "source", dtype="float32")
    fuseweights.convert(source, tmp_path / "fused", fuse=["gdn_qkvz", "qkv"])
    model = load(family, tmp_path / "fused")
    groups = {p.group for p in fused_in(model)}
    assert groups == {"gdn_qkvz", "gdn_ba", "qkv", "gate_up"}
    assert error(run(model, family), run(load(family, source), family)) < 1e-5
    door.save_pretrained(model, tmp_path / "split")
    load(family, source).save_pretrained(tmp_path / "first")
    assert not differ(tmp_path / "split", tmp_path / "first")


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "bert", "gemma3"])
def test_base_models(family: str, tmp_path: Path) -> None:
    source = hf_models.save(family, tmp_path / "source", dtype="float32")
    fuseweights.convert(source, tmp_path / "fused")
    a, b = (transformers.AutoModel.from_pretrained(tmp_path / n) for n in ("source", "fused"))
    assert list(fused_in(b)) and torch.equal(run(a.eval(), family), run(b.eval(), family))


def test_a_text_model_out_of_a_larger_one(tmp_path: Path) -> None:
    """Its configuration is the inner one: that must say that it is fused, too."""
    source = hf_models.save("qwen3_5", tmp_path / "source", dtype="float32")
    fuseweights.convert(source, tmp_path / "fused")
    file = tmp_path / "fused" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["fusion_config"] = {"fuseweights": True}
    file.write_text(json.dumps(config))
    auto = transformers.AutoModelForCausalLM
    b, info = auto.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert list(fused_in(b)) and not info["missing_keys"]
    a = auto.from_pretrained(source)
    assert error(run(b.eval(), "qwen3_5_text"), run(a.eval(), "qwen3_5_text")) < 1e-5


def test_models_that_are_not_fused_are_as_ever(tmp_path: Path) -> None:
    """Their classes, recorded outputs, device maps and pickles, also after a fused one."""
    source = hf_models.save("llama", tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    fused = load("llama", tmp_path / "fused")
    plain, built = load("llama", source), transformers.LlamaForCausalLM(fused.config).eval()
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert all(type(model.model.layers[0]) is layer for model in (fused, plain, built))
    assert pickle.loads(pickle.dumps(fused)).model.layers[0].self_attn.qkv_proj is not None
    ids = torch.randint(3, 100, (1, 5))
    for model in (fused, plain, built):
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3


def test_names_are_not_patterns(tmp_path: Path) -> None:
    """transformers would replace XLMRobertaLayer by a patched RobertaLayer."""
    source = hf_models.save("roberta", tmp_path / "source")
    load("roberta", source, **FUSE)
    config = transformers.XLMRobertaConfig(**hf_models.ENCODER)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    assert type(model.base_model.encoder.layer[0]).__name__ == "XLMRobertaLayer"


def test_a_plain_load_after_patches_were_cleared(tmp_path: Path) -> None:
    """transformers' own way to be rid of patched classes; gemma3 holds a gemma3_text."""
    for family in ("gemma3_text", "gemma3"):
        source = hf_models.save(family, tmp_path / family)
        want = tensors_of(source)
        load(family, source, **FUSE)
        transformers.monkey_patching.clear_patch_mapping()
        load(family, source).save_pretrained(tmp_path / f"{family}-saved")
        saved = tensors_of(tmp_path / f"{family}-saved")
        assert saved.keys() == want.keys() and all(torch.equal(saved[n], want[n]) for n in want)


def test_the_manifest_is_kept_out_of_a_plain_checkpoint(tmp_path: Path) -> None:
    source = hf_models.save("llama", tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    model = load("llama", tmp_path / "fused")
    door.save_pretrained(model, tmp_path / "split")
    assert "fuseweights" not in (tmp_path / "split" / "config.json").read_text()
    assert model.config.fusion_config == {"fuseweights": True}, "the model keeps what it had"
    sharded = tmp_path / "sharded"
    door.save_pretrained(model, sharded, fused=True, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(run(load("llama", sharded), "llama"), run(model, "llama"))


def python(code: str, cwd: Path) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_fuseweights_transformers_refuses(tmp_path: Path) -> None:
    source = hf_models.save("llama", tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    code = """
import transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained("fused")
except ValueError as error:
    print(error)
"""
    assert "Unknown fusion type: fuseweights" in python(code, tmp_path)


@pytest.mark.parametrize("first", ["fuseweights.nn.door", "transformers.fusion_mapping"])
def test_registers_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    source = hf_models.save("llama", tmp_path / "source")
    fuseweights.convert(source, tmp_path / "fused")
    code = f"""
import {first}
import fuseweights.nn.door as door
door.install(); door.install()
import sys
assert sum(type(f).__name__ == "_Waiting" for f in sys.meta_path) <= 1
import transformers
m = transformers.AutoModelForCausalLM.from_pretrained("fused")
print(type(m.model.layers[0].self_attn.q_proj).__name__)
"""
    assert python(code, tmp_path).split() == ["Section"]


def test_the_door_itself_imports_neither() -> None:
    """The file alone: the package that it lies in may import torch."""
    code = Path(door.__file__).read_text()
    top = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert not any("torch" in line or "transformers" in line for line in top)


def test_a_registry_that_is_gone_is_only_a_warning() -> None:
    module = type(sys)("transformers.fusion_mapping")
    with pytest.warns(UserWarning, match="keeps its fusions elsewhere"):
        door.register(module)


def test_parts_that_cannot_be_told_are_an_error() -> None:
    whole = torch.zeros(10, 4)
    assert door._rows((6, 2, 2), whole, "weight") == [6, 2, 2]
    assert door._rows((256, 128, 72), torch.zeros(4, 2), "weight_scale_inv") == [2, 1, 1]
    assert door._rows((192, 64, 64), torch.zeros(3, 2), "weight_scale_inv") is None
    assert door._rows((6, 2, 2), torch.zeros(2, dtype=torch.int64), "weight_shape") is None
    with pytest.raises(ValueError, match="lacks k"):
        door.Stack().convert({"q": [whole]}, ["q", "k"], ["qk"], full_layer_name="x.weight")
    with pytest.raises(ValueError, match="fuses quantized layers"):
        door.Stack().convert(
            {"q": [whole], "k": [whole]}, ["q", "k"], ["qk"], full_layer_name="x.weight_scale"
        )
