"""Make the example checkpoint: a tiny random Llama in the mix that `Q4_K_M` files have.

    python examples/make_example.py [OUT]

In the two last of its four layers `attn_v` and `ffn_down` have more bits than the tensors beside
them, as about half the layers of a real Q4_K_M file do: there q, k and v cannot be stacked. The
bytes are the same in every run. Needs numpy, gguf and xllamacpp (ggml does the quantizing).
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gguf_models import add_tensor  # noqa: E402

LAYERS, EMBD, HEADS, KV_HEADS, HEAD, FF = 4, 256, 4, 2, 32, 128
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these"
)

# Rows of 128 values hold no 256-value block: llama-quantize gives such tensors the second type.
SMALL = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}

# Name, shape in ggml order (row length first), type, type in the layers that get more bits.
LAYER: list[tuple[str, tuple[int, ...], str, str]] = [
    ("attn_norm", (EMBD,), "F32", "F32"),
    ("attn_q", (EMBD, HEADS * HEAD), "Q4_K", "Q4_K"),
    ("attn_k", (EMBD, KV_HEADS * HEAD), "Q4_K", "Q4_K"),
    ("attn_v", (EMBD, KV_HEADS * HEAD), "Q4_K", "Q6_K"),
    ("attn_output", (HEADS * HEAD, EMBD), "Q4_K", "Q4_K"),
    ("ffn_norm", (EMBD,), "F32", "F32"),
    ("ffn_gate", (EMBD, FF), "Q4_K", "Q4_K"),
    ("ffn_up", (EMBD, FF), "Q4_K", "Q4_K"),
    ("ffn_down", (FF, EMBD), "Q4_K", "Q6_K"),
]
MORE_BITS = (2, 3)


def add_metadata(writer: gguf.GGUFWriter) -> None:
    """What a converted and quantized Llama says of itself."""
    writer.add_type("model")
    writer.add_name("Tiny Llama example")
    writer.add_description("Random weights: an example for fuseweights, not a language model")
    writer.add_license("apache-2.0")
    writer.add_size_label("0.9M")
    writer.add_tags(["example"])
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(EMBD)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """A sentencepiece vocabulary: control tokens, bytes, letters, words. Returns its size."""
    kind = gguf.TokenType
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["\u2581", *letters, *("\u2581" + word for word in WORDS.split())]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    kinds = [kind.UNKNOWN, *[kind.CONTROL] * 2, *[kind.BYTE] * 256, *[kind.NORMAL] * len(pieces)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    return len(tokens)


def make(out: Path) -> None:
    """Write the example to `out`."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, "llama")
    add_metadata(writer)
    vocab = add_tokenizer(writer)

    tensors = [("token_embd.weight", (EMBD, vocab), "Q6_K")]
    for i in range(LAYERS):
        tensors += [
            (f"blk.{i}.{name}.weight", shape, better if i in MORE_BITS else usual)
            for name, shape, usual, better in LAYER
        ]
    tensors.append(("output_norm.weight", (EMBD,), "F32"))

    for name, shape, kind in tensors:
        values = rng.standard_normal(shape[::-1], dtype=np.float32) * np.float32(EMBD**-0.5)
        if kind == "F32":
            values += 1
        elif shape[0] % 256:
            kind = SMALL[kind]
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    default = Path(__file__).with_name("tiny-llama-q4_k_m.gguf")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    make(target)
    print(target)
