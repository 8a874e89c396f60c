"""Which fused tensors stock llama.cpp loads, by architecture.

A row is the first build that loads it, or why none does. Builds before `TESTED` are recorded from
llama.cpp's history and were not run. On `TESTED` a small random model of every architecture that is
loaded was run split and fused: all log-probabilities (embeddings of encoders) were equal, and with
k and v exchanged they were not. tests/test_llama_cpp.py repeats the main ones.
"""

from __future__ import annotations

from .groups import Rejects

TESTED = 11549

_CRASHES = Rejects(
    "consumer-unsupported",
    "llama.cpp's loader accepts a fused qkv here, then its graph crashes on the absent q",
)
_APART = Rejects("consumer-unsupported", "llama.cpp loads q, k and v only apart here")
_EXPERTS_APART = Rejects(
    "consumer-unsupported", "llama.cpp loads the experts' gate and up only apart here"
)
_INTERLEAVED = Rejects(
    "order-mismatch",
    "llama.cpp reads z inside ssm_in interleaved per key head; stacked rows load and compute wrong",
)

_QKV_TESTED = """
    afmoe apertus arcee arctic baichuan bailingmoe bert chatglm codeshell cohere2 cohere2moe
    command-r deci deepseek deepseek2-ocr dots1 dream ernie4_5 ernie4_5-moe eurobert exaone
    exaone-moe exaone4 falcon-h1 gemma gemma-embedding gemma2 gemma3n glm4 glm4moe gpt-oss
    granite granite_swa granitehybrid granitemoe grok grovemoe hrm_text hunyuan-dense
    hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 jamba jina-bert-v3 kimi-linear lfm2 lfm2moe
    llada llada-moe llama-embed llama4 maincoder maple mellum mimo2 minicpm minimax-01
    minimax-m2 minimax-m3 mistral3 muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe
    nomic-bert nomic-bert-moe olmo olmo2 olmoe orion paddleocr pangu-embedded phi2 phi3 phimoe
    plamo qwen2moe qwen2vl qwen3tts qwen3vl qwen3vlmoe refact rnd1 seed_oss smallthinker smollm3
    spark2_5 stablelm starcoder2 step35 talkie xverse
""".split()

QKV: dict[str, int | Rejects] = {
    **dict.fromkeys(_QKV_TESTED, TESTED),
    "llama": 8929,
    "qwen2": 8929,
    "qwen3": 8929,
    "qwen3moe": 8929,
    "gemma3": 10068,
    "gemma4": 11063,
    "qwen35": 11063,
    "qwen35moe": 11063,
    "qwen3next": 11063,
    **dict.fromkeys("bailingmoe3 glm5-next kimi-k3 qwen4exp".split(), _CRASHES),
    **dict.fromkeys(
        "bitnet dflash eagle3 gemma-embedding2 gemma4-assistant k2-horizon".split(), _APART
    ),
}

_EXPERTS_NOT = """
    afmoe arctic bailingmoe bailingmoe2 bailingmoe3 dbrx deepseek deepseek32 dots1 ernie4_5-moe
    exaone-moe glm-dsa glm4moe glm5-next gpt-oss granite granitehybrid granitemoe grok grovemoe
    hunyuan-moe k2-horizon kimi-k3 kimi-linear lfm2moe llada-moe llama-embed llama4 maple mellum
    mimo2 minicpm minimax-01 minimax-m2 minimax-m3 mistral3 olmoe phimoe qwen2moe qwen3moe
    qwen3vlmoe refact rnd1 smallthinker step35
""".split()

EXPERTS: dict[str, int | Rejects] = {
    "qwen35moe": 8672,
    "qwen3next": 8672,
    "gemma4": 9093,
    **dict.fromkeys(
        [
            "cohere2moe",
            "deepseek2",
            "deepseek2-ocr",
            "granite_swa",
            "hy_v3",
            "mistral4",
            "qwen4exp",
        ],
        TESTED,
    ),
    **dict.fromkeys(_EXPERTS_NOT, _EXPERTS_APART),
}

# group: (its table, the companions of the fused tensor that are loaded)
LOADED = {
    "qkv": (QKV, frozenset({"weight", "bias", "scale", "input_scale"})),
    "experts": (EXPERTS, frozenset({"weight", "bias"})),
}

# Graphs that multiply by attn_q.scale and its like, but ignore attn_qkv.scale.
SCALE_IGNORED = frozenset({"mimo2", "kimi-linear"})

# (group, architecture): a fused tensor of that name is loaded and then means something else
MISREAD = {("gdn_qkvz", "qwen3next"): _INTERLEAVED}
