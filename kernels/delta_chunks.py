"""The gated delta rule over a prompt, in chunks of 64 tokens (Gated DeltaNet's prefill).

    S ← S·exp(g_t); S ← S + k_t·(β_t·(v_t − Sᵀk_t))ᵀ; o_t = Sᵀq_t / √dk, |q_t| = |k_t| = 1

Inside a chunk, with d_i = Σ_{t ≤ i} g_t, D = tril(exp(d_i − d_j)) and S the state before the chunk
(Yang et al., "Gated Delta Networks", 2024, section 3):

    A = tril(diag(β)·K·Kᵀ ⊙ D, −1)                    (one triangular system a chunk)
    N = (I + A)⁻¹·diag(β)·(V − diag(exp d)·K·S)       (the changes)
    O = diag(exp d)·Q·S + (Q·Kᵀ ⊙ D)·N
    S ← exp(d_last)·S + Kᵀ·diag(exp(d_last − d))·N

The kernels, and how they keep float32's accuracy, are in delta_chunks_kernels.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta_chunks_kernels import across, within
from .launch import check, launch, pdl, register

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # as in launch.py
    TensorDescriptor = None

CHUNK = 64
#: How many fp16 numbers hold a scaled one of the dtype.
HALVES = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}
#: Tokens of all heads and sequences whose (I + A)⁻¹ and Q·Kᵀ ⊙ D are in memory at a time: 67 MB.
SEGMENT = 128 * 1024
#: Key heads at most this wide, fp16 numbers for one of q's → `within`'s warps and most registers a
#: thread; the state's columns in a program of `across`, its warps and pipeline stages.
CONFIGURATIONS = {
    (128, 1): (4, 168, 32, 4, 3),
    (128, 2): (4, None, 32, 4, 2),
    (256, 1): (8, None, 16, 4, 2),
}


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    tiled: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `delta_chunks` computes, in float32, or in float64 where q is float64."""
    kind = torch.promote_types(q.dtype, torch.float32)
    batch, tokens, heads, dv = v.shape
    if A_log is not None:
        g, beta = -A_log.to(kind).exp() * F.softplus(g.to(kind) + dt_bias), beta.to(kind).sigmoid()

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, n] → [B, H, chunks, CHUNK, n]
        x = F.pad(x.to(kind).transpose(1, 2), (0, 0, 0, -tokens % CHUNK))
        return x.unflatten(2, (-1, CHUNK)).contiguous()

    def unit(x: Tensor) -> Tensor:  # and repeated for the value heads
        x, r = x.to(kind), heads // x.shape[2]
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat(1, 1, r, 1) if tiled else x.repeat_interleave(r, 2)

    q, k, v = chunked(unit(q) * q.shape[-1] ** -0.5), chunked(unit(k)), chunked(v)
    beta, decay = chunked(beta[..., None]), chunked(g[..., None]).cumsum(-2)
    between = (decay - decay.mT).tril().exp().tril()  # from token j to a later token i
    system = (k * beta @ k.mT * between).tril(-1)
    sides = torch.cat((v * beta, k * beta * decay.exp()), -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    change, from_state = solved.split((dv, k.shape[-1]), -1)
    scores = q @ k.mT * between
    q, last = q * decay.exp(), decay[..., -1:, :]
    k, last = k * (last - decay).exp(), last.exp()

    state = v.new_zeros(batch, heads, k.shape[-1], dv) if state is None else state.to(kind).clone()
    out = [v.new_empty(batch, heads, 0, dv)]
    for i in range(v.shape[2]):
        new = change[:, :, i] - from_state[:, :, i] @ state
        out.append(q[:, :, i] @ state + scores[:, :, i] @ new)
        state = state * last[:, :, i] + k[:, :, i].mT @ new
    return torch.cat(out, 2)[:, :, :tokens].transpose(1, 2).contiguous(), state


def _need(condition: bool, what: str, expected: object, found: object) -> None:
    check(condition, f"delta_chunks: {what} must be {expected}, found {found}")


def _check(q, k, v, **others: Tensor | None) -> None:
    for what, x in {"q": q, "k": k, "v": v}.items():
        _need(x.dim() == 4, what, "[B, T, heads, d]", f"shape {tuple(x.shape)}")
        _need(x.dtype in HALVES and x.dtype == q.dtype, "q, k and v",
              "all bf16, fp16 or fp32", f"{q.dtype} and {what} of {x.dtype}")  # fmt: skip
        _need(x.stride(-1) == 1 or x.shape[-1] == 1, f"{what}'s last dimension", "contiguous",
              f"strides {x.stride()}")  # fmt: skip
    (batch, tokens, heads, dv), (key_heads, dk) = v.shape, k.shape[2:]
    keys = batch, tokens, key_heads, dk
    _need(q.shape == k.shape == keys, "q and k", keys, f"{tuple(q.shape)}, {tuple(k.shape)}")
    _need(key_heads > 0 and heads % key_heads == 0, "value heads", "a multiple of key heads",
          f"{heads} and {key_heads}")  # fmt: skip
    widest = max(wide for wide, halves in CONFIGURATIONS if halves == HALVES[q.dtype])
    _need(0 < dk <= widest and dv > 0, f"key heads in {q.dtype}", f"at most {widest} wide", dk)
    _need(batch * heads < 65536, "sequences · heads", "below 65536", batch * heads)
    shapes = {"state": (batch, heads, dk, dv), "A_log": (heads,), "dt_bias": (heads,)}
    for what, x in others.items():
        if x is not None:
            shape = shapes.get(what, (batch, tokens, heads))  # g and beta
            _need(x.shape == shape, what, shape, tuple(x.shape))
            _need(x.dtype in HALVES, what, "bf16, fp16 or fp32", x.dtype)
    for what, x in {"k": k, "v": v, **others}.items():
        if x is not None:
            _need(x.device == q.device, what, f"on {q.device}", x.device)
    gates = others["A_log"] is None, others["dt_bias"] is None
    check(gates[0] == gates[1], "delta_chunks: A_log needs dt_bias, and dt_bias A_log")


def delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    tiled: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over T tokens → (output [B, T, nV, dv], new state), both float32.

    q, k [B, T, nK, dk], v [B, T, nV, dv]: bf16 or fp16 with dk ≤ 256, or fp32 with dk ≤ 128, one
    dtype, views with a contiguous last dimension. Value head h reads key head h div (nV / nK),
    `tiled` h mod nK. q and k are divided by √(Σx² + 1e-6), and q by √dk. Log decay g ≤ 0 and beta
    in [0, 2], both [B, T, nV] with any strides; with `A_log` and `dt_bias` [nV] they are in_proj's
    a and b: g = −exp(A_log)·softplus(a + dt_bias), beta = sigmoid(b). state [B, nV, dk, dv], or
    None for zeros. Raises KernelError.
    """
    _check(q, k, v, g=g, beta=beta, state=state, A_log=A_log, dt_bias=dt_bias)
    (batch, tokens, heads, dv), (key_heads, dk) = v.shape, k.shape[2:]
    like = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(batch, tokens, heads, dv, **like)
    new_state = torch.empty(batch, heads, dk, dv, **like)
    if out.numel() == 0:
        return out, new_state.copy_(0 if state is None else state)
    if state is not None and state.stride(-1) != 1:
        state = state.contiguous()
    together = max(1, SEGMENT // CHUNK // max(1, batch * heads))  # chunks of all heads at a time
    together = min(together, -(-tokens // CHUNK))
    blocks = batch * heads * together
    wide = max(16, 1 << (dk - 1).bit_length())
    half = {"dtype": torch.float16, "device": q.device}
    unit = torch.empty(batch * key_heads * together * 2 * HALVES[q.dtype] * CHUNK, wide, **half)
    squares = torch.empty(blocks * 4 * CHUNK, CHUNK, **half)
    rows = torch.empty(blocks, 5, CHUNK, **like)
    room = out if dv % 4 == 0 else _aligned(out)
    for start in range(0, tokens, together * CHUNK):
        here = slice(start, start + together * CHUNK)
        _segment(
            *(x[:, here] for x in (q, k, v, g, beta)), state, tiled, A_log, dt_bias,
            unit, squares, rows, room[:, here], new_state,
        )  # fmt: skip
        state = new_state
    return out if room is out else out.copy_(room), new_state


def _aligned(x: Tensor) -> Tensor:
    """x, copied if the copy engine could not read it: it wants all but the last stride, and the
    first element, at multiples of 16 bytes."""
    each = x.element_size()
    if x.data_ptr() % 16 or any(stride * each % 16 for stride in x.stride()[:-1]):
        return F.pad(x, (0, -x.shape[-1] % (16 // each)))[..., : x.shape[-1]]
    return x


def _segment(
    q, k, v, g, beta, state, tiled, A_log, dt_bias, unit, squares, rows, out, new_state
) -> None:  # fmt: skip
    (batch, tokens, heads, dv), (key_heads, dk) = v.shape, k.shape[2:]
    chunks = -(-tokens // CHUNK)
    repeated = 1 if tiled else heads // key_heads  # h reads key head (h div repeated) mod nK
    shape = 128 if dk <= 128 else 256, HALVES[q.dtype]
    within_warps, registers, block_v, warps, stages = CONFIGURATIONS[shape]
    block_v = min(block_v, max(16, 1 << (dv - 1).bit_length()))
    both = {"DK": dk, "BK": unit.shape[1], "N": HALVES[q.dtype], "pdl": pdl(q)}
    launch(
        within, (chunks, batch * heads),
        q, k, g, beta, A_log if A_log is not None else g, dt_bias if dt_bias is not None else g,
        unit, squares, rows, tokens, heads, repeated, key_heads, dk**-0.5,
        *q.stride()[:3], *k.stride()[:3], *g.stride(), *beta.stride(),
        GATED=A_log is not None, num_warps=within_warps, maxnreg=registers, **both,
    )  # fmt: skip

    def tiles(x: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, CHUNK, block_v])

    old = new_state if state is None else state
    launch(
        across, (-(-dv // block_v), batch * heads),
        TensorDescriptor.from_tensor(unit, [CHUNK, unit.shape[1]]), v,
        TensorDescriptor.from_tensor(squares, [CHUNK, CHUNK]), rows, old, tiles(out), new_state,
        tokens, heads, repeated, key_heads, chunks, *v.stride()[:3], *old.stride()[:3],
        DV=dv, BV=block_v, HAS_STATE=state is not None, STAGES=stages, num_warps=warps, **both,
    )  # fmt: skip


def _fake(q, k, v, g, beta, state, tiled=False, A_log=None, dt_bias=None):  # type: ignore
    state = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return v.new_empty(v.shape, dtype=torch.float32), v.new_empty(state, dtype=torch.float32)


op = register(
    "delta_chunks(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, "
    "bool tiled=False, Tensor? A_log=None, Tensor? dt_bias=None) -> (Tensor, Tensor)",
    cuda=delta_chunks, cpu=reference, fake=_fake,
)  # fmt: skip
