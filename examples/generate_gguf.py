"""Run a GGUF file as it is, split or fused, and print what it says and how fast.

    python examples/generate_gguf.py model.gguf --prompt "The capital of France is" --device cuda

Linear layers keep the file's blocks. Needs `pip install 'fuseweights[transformers]'`.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import fuseweights
from fuseweights.nn import Decoder

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("gguf", type=Path)
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
given = parser.parse_args()

model = fuseweights.load_model(given.gguf, device=given.device)
tokenizer = AutoTokenizer.from_pretrained(str(given.gguf.parent), gguf_file=given.gguf.name)
ids = tokenizer(given.prompt, return_tensors="pt").input_ids.to(given.device)
decoder = Decoder(model, max_length=ids.shape[1] + given.tokens)
decoder.generate(ids, 2)  # compiles what has to be compiled

begun = time.perf_counter()
out = decoder.generate(ids, given.tokens).cpu()
seconds = time.perf_counter() - begun
print(tokenizer.decode(out[0]))
print(f"{given.tokens / seconds:.1f} tokens/s with the prompt, on {given.device}")
