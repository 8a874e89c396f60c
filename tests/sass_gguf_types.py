"""More of sass_gguf_linear.py: every type, and more rows."""

from __future__ import annotations

from fuseweights.kernels.gguf_types import TYPES
from sass_gguf_linear import Q4_K, Q6_K, Q8_0, dequantize, product

SASS = {
    **{f"{TYPES[t].name} gate_up M=1": product(t, "gate_up", 1) for t in TYPES},
    **{f"{TYPES[t].name} qkv M=1": product(t, "qkv", 1) for t in TYPES},
    **{f"{TYPES[t].name} qkv M=8": product(t, "qkv", 8) for t in (Q6_K, Q8_0)},
    **{f"Q4_K qkv M={m}": product(Q4_K, "qkv", m) for m in (2, 16)},
    **{f"{TYPES[t].name} dequantize": dequantize(t) for t in (Q6_K, Q8_0)},
}
