"""Whole transformers models with our modules in place of theirs, against the originals."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from nn_models import build, distance, swap  # noqa: E402

#: Families whose attention and MLPs never leave float64; only their norms do.
EXACT = [
    *("llama", "llama_bias", "llama_tied", "mistral", "qwen2", "qwen2_moe", "mixtral", "granite"),
    *("smollm3", "phi3", "glm4", "glm4_moe", "deepseek_v3", "gpt_oss", "starcoder2"),
    *("bert", "roberta"),
]
ROUNDED = [
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma2"),
    *("gemma3_text", "gemma4_text", "gemma4_k_eq_v", "olmo2", "olmo3", "cohere2", "minimax_m2"),
]
ALL = EXACT + ROUNDED
TOP_K = {"gemma4_k_eq_v": "top_k_experts"} | dict.fromkeys(
    [
        *("qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen2_moe", "mixtral", "deepseek_v3"),
        *("glm4_moe", "gpt_oss", "minimax_m2"),
    ],
    "num_experts_per_tok",
)
ENCODERS = ("bert", "roberta")
DECODERS = [family for family in ALL if family not in ENCODERS]
QWEN = {"use_sliding_window": True, "max_window_layers": 0}
WINDOWED = {"qwen2": QWEN, "qwen3": QWEN, "mistral": {}, "gemma2": {}, "gemma3_text": {}}
WINDOWED |= {"gemma4_text": {}, "gpt_oss": {}, "cohere2": {}, "olmo3": {}, "phi3": {}}


@pytest.fixture(scope="module")
def pair():
    """(original, ours) of a family in float64, built once."""
    made = {}

    def get(family: str, **changes):
        key = family, tuple(changes.items())
        if key not in made:
            model = build(family, **changes)
            made[key] = model, swap(model)[0]
        return made[key]

    return get


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ALL)
def test_prefill(family, pair):
    ids = tokens(2, 13)
    model, ours = pair(family)
    with torch.no_grad():
        exact, wide = model(ids).logits, ours(ids).logits
        assert distance(wide, exact) <= 1e-6
        if family in EXACT:
            assert distance(swap(model, norms=False)[0](ids).logits, exact) <= 1e-12
        single = copy.deepcopy(ours).float()(ids).logits
        assert distance(single, copy.deepcopy(model).float()(ids).logits) <= 1e-5


@pytest.mark.parametrize("family", ALL)
def test_bfloat16_is_no_further_from_the_truth(family, pair):
    """Mixtures use every expert here: with fewer, one rounding more or less picks another one."""
    every = {TOP_K[family]: 4} if family in TOP_K else {}
    model, ours = pair(family, **every)
    ids = tokens(4, 13)
    with torch.no_grad():
        truth = ours(ids).logits
        mine = distance(copy.deepcopy(ours).bfloat16()(ids).logits, truth)
        theirs = distance(copy.deepcopy(model).bfloat16()(ids).logits, truth)
    assert mine <= 1.1 * theirs


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_bfloat16_of_a_delta_net_token_by_token(family):
    """Nearer than the original over seeds. By token, because a few tokens are ill-conditioned in
    both: the norm divides by an output that can be nearly zero (first token: (q·k) v / |q·k|), and
    one such token then decides the norm of a whole comparison, either way."""
    every, errors = {TOP_K[family]: 4} if family in TOP_K else {}, {"mine": [], "theirs": []}
    ids = tokens(4, 13)
    for seed in range(6):
        model = build(family, seed=seed, **every)
        ours, _ = swap(model)
        with torch.no_grad():
            truth = ours(ids).logits
            for who, m in (("mine", ours), ("theirs", model)):
                wrong = m.bfloat16()(ids).logits.double() - truth
                errors[who].append((wrong.norm(dim=-1) / truth.norm(dim=-1)).flatten())
    mine, theirs = (torch.cat(found) for found in errors.values())
    assert mine.median() <= theirs.median()
    assert mine.log().mean() <= theirs.log().mean()


def steps(model, ids: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None):
    """Logits of `ids` fed `sizes` tokens at a time through one cache."""
    from transformers import DynamicCache

    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        seen = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        if mask is not None:
            places = mask[:, : start + size].cumsum(1).sub(1).clamp(min=0)
            seen["position_ids"] = places[:, start:]
        out.append(
            model(
                ids[:, start : start + size], past_key_values=cache, use_cache=True, **seen
            ).logits
        )
        start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", DECODERS)
def test_decode_with_a_cache(family, pair):
    """Prefill, single steps, then several tokens onto a filled cache; from one token on, too."""
    model, ours = pair(family)
    ids = tokens(2, 15)
    with torch.no_grad():
        for sizes in ([8, 1, 1, 4, 1], [1, 1, 2, 11]):
            mine = steps(ours, ids, sizes)
            assert distance(mine, steps(model, ids, sizes)) <= 1e-6
        assert distance(mine, ours(ids).logits) <= 1e-6


@pytest.mark.parametrize("family", ALL)
def test_padded_batch(family, pair):
    """Left padding for decoders, right padding for encoders; padding changes nothing."""
    model, ours = pair(family)
    if family == "gemma2":  # its float64 mask is -inf in the float32 of its softmax: NaN
        model, ours = (copy.deepcopy(m).float() for m in (model, ours))
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    if family in ENCODERS:
        mask[1, 7:] = 0
        ids = ids.masked_fill(mask == 0, 1 if family == "roberta" else 0)
    else:
        mask[1, :5] = 0
    keep = mask.bool()
    with torch.no_grad():
        if family in ENCODERS:
            a, b = (m(ids, attention_mask=mask).logits for m in (ours, model))
            alone = ours(ids[1:, :7]).logits[0]
        else:
            a, b = (steps(m, ids, [9, 1, 1, 1], mask) for m in (ours, model))
            alone = ours(ids[1:, 5:]).logits[0]
        assert distance(a[keep], b[keep]) <= 1e-6
        assert distance(a[1][keep[1]], alone) <= 1e-6


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_window(family, pair):
    model, ours = pair(family, sliding_window=5, **WINDOWED[family])
    ids = tokens(1, 17)
    with torch.no_grad():
        for sizes in ([17], [9, 1, 1, 5, 1]):
            assert distance(steps(ours, ids, sizes), steps(model, ids, sizes)) <= 1e-6
        seen, other = ours(ids).logits, ids.clone()
        other[0, 0] = 5 + (ids[0, 0] == 5)
        layers = model.config.num_hidden_layers
        full = "full_attention" in (getattr(model.config, "layer_types", None) or ())
        if not full:  # the first token is out of every window's reach
            late = ours(other).logits[:, 1 + 4 * layers :]
            assert torch.equal(late, seen[:, 1 + 4 * layers :])


@pytest.mark.parametrize("family", DECODERS)
def test_generate_gives_the_same_tokens(family, pair):
    model, ours = (copy.deepcopy(m).float() for m in pair(family))
    ids = tokens(2, 6)
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    a, b = (m.generate(ids, attention_mask=mask, **how) for m in (ours, model))
    assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5_text", "gemma3_text"])
def test_attention_implementations(family, implementation):
    model = build(family)
    model.set_attn_implementation(implementation)
    ours, _ = swap(model)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert distance(ours(ids).logits, model(ids).logits) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_5_text"])
def test_gradients(family):
    """Trainable like the original: the gradient of the fused weight is the parts', stacked."""
    model = build(family)
    ours, _ = swap(model)
    ids = tokens(2, 9)
    for m in (model, ours):
        m(ids, labels=ids).loss.backward()
    at = 1 if family == "qwen3_5_text" else 0
    old, new = (m.model.layers[at].self_attn for m in (model, ours))
    theirs = torch.cat([getattr(old, f"{p}_proj").weight.grad for p in "qkv"])
    assert distance(new.qkv_proj.weight.grad, theirs) <= 1e-6
    if family == "qwen3_moe":
        old, new = (m.model.layers[0].mlp.experts for m in (model, ours))
        assert distance(new.gate_up_proj.grad, old.gate_up_proj.grad) <= 1e-6
    if family == "qwen3_5_text":
        old, new = (m.model.layers[0].linear_attn for m in (model, ours))
        parts = [getattr(old, f"in_proj_{p}").weight.grad for p in ("qkv", "z", "b", "a")]
        assert distance(new.in_proj.weight.grad, torch.cat(parts)) <= 1e-6


STEPS = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "qwen3_next", "qwen3_5_text"]


class DecodeStep(torch.nn.Module):
    """One token through a model whose cache is its own, as a decode loop or an exporter has it."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, ids, position_ids):
        return self.model(ids, position_ids=position_ids, past_key_values=self.cache).logits


def decode_step(family: str, pair) -> tuple[DecodeStep, torch.Tensor]:
    """A swapped model with five tokens in a static cache, and the next tokens."""
    from transformers import StaticCache

    ours = copy.deepcopy(pair(family)[1]).float()
    cache = StaticCache(config=ours.config, max_cache_len=16)
    ids = tokens(1, 8)
    ours(ids[:, :5], past_key_values=cache)
    return DecodeStep(ours, cache), ids


@pytest.mark.parametrize("family", STEPS)
def test_decode_step_compiles_in_one_graph(family, pair):
    torch.compiler.reset()
    with torch.no_grad():
        step, ids = decode_step(family, pair)
        plain, _ = decode_step(family, pair)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for at in range(5, 8):
            place = torch.tensor([[at]])
            got, want = (s(ids[:, at : at + 1], place) for s in (compiled, plain))
            assert distance(got, want) <= 1e-5


@pytest.mark.parametrize("family", STEPS)
def test_decode_step_exports(family, pair):
    with torch.no_grad():
        step, ids = decode_step(family, pair)
        plain, _ = decode_step(family, pair)
        program = torch.export.export(step, (ids[:, 5:6], torch.tensor([[5]])), strict=True)
        exported = program.module()
        # transformers counts a sliding window's tokens in Python: its export is right for one step
        for at in range(5, 6 if family == "gemma3_text" else 8):
            inputs = ids[:, at : at + 1], torch.tensor([[at]])
            assert distance(exported(*inputs), plain(*inputs)) <= 1e-5
