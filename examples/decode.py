"""Generate with a transformers directory, fused or not, and print what it says and how fast.

    python examples/decode.py Qwen3-8B --prompt "The capital of France is" --device cuda

For a GGUF file: generate_gguf.py. Needs `pip install 'fuseweights[transformers]'`.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuseweights  # noqa: F401  (opens transformers' door for fused directories)
from fuseweights.nn import Decoder

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("model")
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--tokens", type=int, default=100)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").to(given.device)
tokenizer = AutoTokenizer.from_pretrained(given.model)
ids = tokenizer(given.prompt, return_tensors="pt").input_ids.to(given.device)
decoder = Decoder(model, max_length=ids.shape[1] + given.tokens)
decoder.prefill(ids)  # compiles what has to be compiled

begun = time.perf_counter()
out = decoder.generate(ids, given.tokens, eos=tokenizer.eos_token_id).cpu()
seconds = time.perf_counter() - begun
print(tokenizer.decode(out[0]))
print(f"{(out.shape[1] - ids.shape[1]) / seconds:.1f} tokens/s with the prompt, on {given.device}")
