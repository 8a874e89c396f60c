"""patch_model: the same numbers from one product, and back to exactly what was there."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from torch import nn  # noqa: E402

from fuseweights.nn.patch import Section, fused_in, patch_model, unpatch_model  # noqa: E402

FAMILIES = [name for name, row in hf_models.FAMILIES.items() if isinstance(row, hf_models.Family)]
#: Groups that fuse in the fixture's two to four layers.
GROUPS = {
    "llama": {"qkv": 2, "gate_up": 2},
    "gemma3": {"qkv": 4, "gate_up": 2},
    "glm4_moe": {"qkv": 2, "gate_up": 1, "shared_gate_up": 1},
    "qwen3_next": {"qkv": 1, "shared_gate_up": 2},
    "qwen3_5": {"gdn_in_proj": 1, "qkv": 1, "gate_up": 2},
    "deepseek_v3": {"qkv_a": 2, "gate_up": 1, "shared_gate_up": 1},
    "gpt_oss": {"qkv": 2},
    "bert": {"qkv": 2},
    "vit": {"qkv": 2},
    "phi3": {},
    "whisper": {},
}
#: These drop to float32 inside whatever the model's type: norms, RoPE, router, delta rule.
EXACT_64 = {"bert", "roberta", "vit", "siglip"}
DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text",
    "qwen3_5_moe_text", "gemma2", "gemma3_text", "gemma4_text", "phi3", "glm4", "deepseek_v3",
    "gpt_oss",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = hf_models._build(hf_models.FAMILIES[family], dtype).eval()
    if dtype == torch.float64:  # grouped products know no float64
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def run(model: nn.Module, family: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    ids = torch.randint(3, 100, (2, 7), generator=random)
    if family == "whisper":
        out = model(input_features=noise(2, 8, 64), decoder_input_ids=ids)
    elif family == "vit":
        out = model(pixel_values=noise(1, 3, 16, 16))
    elif family == "siglip":
        out = model(input_ids=ids, pixel_values=noise(1, 3, 16, 16)).text_model_output
    else:
        out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out[0]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def counted(report) -> dict[str, int]:
    groups = [patched.group for patched in report.fused]
    return {group: groups.count(group) for group in dict.fromkeys(groups)}


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_computes_the_same_and_comes_back_exactly(family: str) -> None:
    model = build(family)
    want = run(model, family)
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    report = patch_model(model)
    if family in GROUPS:
        assert counted(report) == GROUPS[family]
    assert report.note is None
    got = run(model, family)
    assert error(got, want) < 1e-5
    assert patch_model(model) == report
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, family), got)
    assert not unpatch_model(model).fused
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    for name, tensor in after.items():
        assert id(tensor) == state[name][0] and torch.equal(tensor, state[name][1])
    assert torch.equal(run(model, family), want)
    assert torch.equal(run(twin, family), got), "a copy lives on its own"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gpt2", "falcon", "bloom")])
def test_errors_in_float64_and_bfloat16(family: str) -> None:
    exact = build(family, torch.float64)
    want = run(exact, family)
    patch_model(exact)
    assert error(run(exact, family), want) <= (1e-12 if family in EXACT_64 else 1e-6)
    model = build(family, torch.float64).bfloat16()
    exact = copy.deepcopy(model).double()
    want = run(exact, family)
    before = error(run(model, family), want)
    patch_model(model)
    assert error(run(model, family), want) <= 1.1 * before + 1e-12


@pytest.mark.parametrize("family", DECODERS)
def test_generates_the_same_tokens(family: str) -> None:
    """Cached decoding of a padded batch, past the sliding window where there is one."""
    model = build(family)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 8
        for module in model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 8
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **options)
    patch_model(model)
    assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(48, 16, 16), (512, 128, 128), (1000, 7, 9)])
@pytest.mark.parametrize("width", [64, 250, 2048])
def test_one_row_in_float32(width: int, sizes: tuple[int, int, int], bias: bool) -> None:
    """One token on a CPU: the fused product's numbers are the parts' to the bit where every part
    has a multiple of 16 rows. Elsewhere the last rows of a part fall into another block of MKL's
    kernel, which sums in another order: some 1e-7."""
    model = build("llama")
    attention = model.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    for name, rows in zip(names, sizes, strict=True):
        setattr(attention, name, nn.Linear(width, rows, bias=bias))
    x = torch.randn(1, width)
    want = [getattr(attention, name)(x) for name in names]
    patch_model(model)
    got = [getattr(attention, name)(x) for name in names]
    if all(rows % 16 == 0 for rows in sizes):
        assert all(map(torch.equal, got, want))
    assert max(map(error, got, want)) < 5e-7


def test_the_product_is_computed_once() -> None:
    model = build("llama")
    patch_model(model)
    calls = []
    attention = model.model.layers[0].self_attn
    attention.qkv_proj.register_forward_hook(lambda *_: calls.append(1))
    run(model, "llama")
    assert len(calls) == 1
    assert attention.q_proj.product.kept is None, "nothing is kept after the forward"
    x, y = torch.randn(2, 64).unbind()
    q = attention.q_proj(x)
    k = attention.k_proj(y)  # another input, as in cross attention
    whole = attention.qkv_proj.weight
    assert error(q, whole[:64] @ x) < 1e-6 and error(k, whole[64:96] @ y) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "deepseek_v3", "gemma4_text"])
def test_gradients_are_the_parts_gradients(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, 100, (1, 6))
    model(input_ids=ids).logits.square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    report = patch_model(model)
    model.zero_grad()
    model(input_ids=ids).logits.square().sum().backward()
    parameters = dict(model.named_parameters())
    for patched in report.fused:
        grads = parameters[f"{patched.name}.weight"].grad.split(patched.sizes)
        for part, grad in zip(patched.parts, grads, strict=True):
            assert error(grad, want[f"{part}.weight"]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5_text", "gemma2"])
def test_compiles_whole(family: str) -> None:
    model = build(family)
    patch_model(model)
    want = run(model, family)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert error(run(compiled, family), want) < 1e-5


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    model = build("llama")
    patch_model(model)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64)
    program = torch.export.export(layer, (x,), strict=strict)
    assert set(program.state_dict) == {"gate_up_proj.weight", "down_proj.weight"}
    assert torch.equal(program.module()(x), layer(x))


class Lora(nn.Module):
    """What peft makes of a linear layer, as far as it matters here."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _lora(layer: nn.Module) -> None:
    layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)


def _hook(layer: nn.Module) -> None:
    layer.self_attn.k_proj.register_forward_hook(lambda *_: None)


def _other_type(layer: nn.Module) -> None:
    layer.self_attn.k_proj.double()


def _tie(layer: nn.Module) -> None:
    layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight


def _share_storage(layer: nn.Module) -> None:
    layer.self_attn.v_proj.weight = nn.Parameter(layer.self_attn.k_proj.weight.detach())


def _freeze(layer: nn.Module) -> None:
    layer.self_attn.v_proj.requires_grad_(False)


def _bias(layer: nn.Module) -> None:
    layer.self_attn.v_proj.bias = nn.Parameter(torch.zeros(32))


def _subclass(layer: nn.Module) -> None:
    layer.self_attn.v_proj.__class__ = type("Quantized", (nn.Linear,), {})


def _parametrize(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer.self_attn.v_proj)


def _name(layer: nn.Module) -> None:
    layer.self_attn.qkv_proj = nn.Identity()


@pytest.mark.parametrize(
    "change, reason",
    [
        (_lora, "adapter"),
        (_hook, "hooked"),
        (_other_type, "type-mismatch"),
        (_tie, "tied-weight"),
        (_share_storage, "tied-weight"),
        (_freeze, "grad-mismatch"),
        (_bias, "bias-mismatch"),
        (_subclass, "format-unsupported"),
        (_parametrize, "format-unsupported"),
        (_name, "name-taken"),
    ],
)
def test_what_does_not_stack_is_left_with_its_reason(change, reason: str) -> None:
    model = build("llama")
    layer = model.model.layers[1]
    change(layer)
    before = {name: id(module) for name, module in layer.self_attn.named_modules()}
    report = patch_model(model)
    assert [(r.group, r.layer, r.reason) for r in report.left] == [("qkv", 1, reason)]
    assert report.left[0].parts[0] == "model.layers.1.self_attn.q_proj" and report.left[0].detail
    assert counted(report) == {"qkv": 1, "gate_up": 2}
    assert {name: id(module) for name, module in layer.self_attn.named_modules()} == before


def test_peft(tmp_path: Path) -> None:
    """LoRA first: its layers are left. LoRA after: it wraps the fused layer like any other."""
    peft = pytest.importorskip("peft")
    options = {"r": 2, "init_lora_weights": False}
    model = build("llama")
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options)).eval()
    want = run(lora, "llama")
    report = patch_model(lora)
    assert {r.reason for r in report.left} == {"adapter"} and counted(report) == {"gate_up": 2}
    assert error(run(lora, "llama"), want) < 1e-5
    model = build("llama")
    patch_model(model)
    want = run(model, "llama")
    config = peft.LoraConfig(target_modules=["qkv_proj"], **options)
    lora = peft.get_peft_model(model, config).eval()
    assert error(run(lora, "llama"), want) > 1e-3
    with lora.disable_adapter():
        assert error(run(lora, "llama"), want) < 1e-6


def test_missing_parts_and_unknown_families_are_left() -> None:
    reasons = {r.reason for r in patch_model(build("gemma4_text")).left}
    assert reasons == {"missing-part"}
    model = build("llama")
    model.config = type("Config", (), {"model_type": "something"})()
    report = patch_model(model)
    assert not report.fused and {r.reason for r in report.left} == {"unknown-architecture"}


def test_second_choice_where_the_first_does_not_stack() -> None:
    model = build("qwen3_5_text")
    mixer = model.model.layers[0].linear_attn
    for part in (mixer.in_proj_b, mixer.in_proj_a):
        part.float().requires_grad_(False)
    report = patch_model(model)
    groups = counted(report)
    assert groups["gdn_qkvz"] == 1 and groups["gdn_ba"] == 1 and not report.left


def test_tied_embeddings_stay_tied() -> None:
    model = build("llama_tied")
    patch_model(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    unpatch_model(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_replaced_fused_layer_is_left_by_unpatch() -> None:
    model = build("llama")
    patch_model(model)
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = Lora(attention.qkv_proj)
    attention.qkv_proj.lora_B = nn.Linear(2, 128, bias=False)
    run(model, "llama")
    report = unpatch_model(model)
    assert [(r.group, r.layer, r.reason) for r in report.left] == [("qkv", 0, "adapter")]
    assert len(report.fused) == 1 and isinstance(attention.q_proj, Section)


def test_changed_meanwhile() -> None:
    """Type, training and values of the fused layer go back to the parts."""
    model = build("llama")
    patch_model(model)
    model.double().train()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.qkv_proj.weight += 1
    whole = attention.qkv_proj.weight.detach().clone()
    unpatch_model(model)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(torch.cat([part.weight for part in parts]), whole)
    assert all(part.training and part.weight.dtype == torch.float64 for part in parts)


def test_many_models_copies_pickles_and_garbage() -> None:
    model, other = build("llama"), build("qwen3")
    want = run(model, "llama"), run(other, "qwen3")
    patch_model(model)
    patch_model(other)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    gc.disable()
    try:
        gone = [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn.qkv_proj)]
        del model
        assert [ref() for ref in gone] == [None, None], "no cycle keeps a model alive"
    finally:
        gc.enable()
    gc.collect()
    fresh = build("llama")
    assert not list(fused_in(fresh)) and len(list(fused_in(other))) == 4
    unpatch_model(loaded)
    assert torch.equal(run(loaded, "llama"), want[0])
    unpatch_model(other)
    assert torch.equal(run(other, "qwen3"), want[1])


PEAK = """
import torch, transformers
from fuseweights.nn.patch import patch_model, unpatch_model
torch.set_num_threads(1)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1536,
    num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=4)
model = transformers.LlamaForCausalLM(config)
size = sum(p.nbytes for p in model.parameters())
def memory(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
for change in (patch_model, unpatch_model):
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    change(model)
    print((size + memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_peaks_below_a_tenth_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    peaks = [float(line) for line in ran.stdout.split()]
    assert len(peaks) == 2 and max(peaks) < 1.1, peaks
