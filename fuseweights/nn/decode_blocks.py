"""The blocks a decoder layer consists of, each with the state that it keeps between tokens.

A block is called with x [B, T, H] and `Place`, and returns [B, T, H]. T = 1 is a decoding step: it
reads where it is from the device alone, so that a CUDA graph of it can be replayed. T > 1, or a
host-side start, is a prefill through the same state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels import decode_attention, gated_delta_decode  # noqa: F401
from ..kernels.gdn_projection import Heads, views
from ..kernels.qkv_rope import gate_view
from . import ops
from .attention import FusedAttention
from .delta_net import GatedDeltaNet
from .linear import FusedLinear
from .mlp import GatedMLP
from .moe import Experts, SoftmaxRouter, SparseMoE
from .weights import Plain

OPS = torch.ops.fuseweights
#: Tokens that decode_attention takes; a longer prefill is for PyTorch's attention.
FEW = 16


class Place(NamedTuple):
    """Where the tokens stand: `positions` [T] on the device (int64) and `length` [1], how many
    there are with them; `start`, the first position as the host knows it, None in a step that a
    graph will replay; `angles`, cos and sin [1, T, n] there for every kind of layer."""

    positions: Tensor
    length: Tensor
    start: int | None
    angles: dict[str | None, tuple[Tensor, Tensor]]


class Room(NamedTuple):
    """What a block makes its state for."""

    batch: int
    max_length: int
    dtype: torch.dtype
    device: torch.device


class Attention:
    """Attention over its own cache: keys and values [B, kv heads, max_length, d]. `kind` is the
    layer's, by which it finds its angles."""

    def __init__(self, mixer: FusedAttention, kind: str | None, room: Room):
        a = self.attention = mixer
        norms = [norm for norm in (a.q_norm, a.k_norm, a.v_norm) if norm is not None]
        odd = {
            "keys shared between layers": a.shares_kv_as is not None,
            "a norm over all heads at once": any(n.size != a.head_dim for n in norms),
            "norms that differ": len({(n.eps, n.norm) for n in norms}) > 1,
            "no output projection": a.out_name is None,
        }
        if problems := [what for what, has in odd.items() if has]:
            raise UsageError(f"Decoder does not know {', '.join(problems)}")
        self.kind, self.out_proj = kind, linear(getattr(a, a.out_name))
        self.heads = a.qkv_proj.rows[0] // a.head_dim // (2 if a.gate else 1)
        self.kv_heads = a.qkv_proj.rows[1] // a.head_dim
        self.weights = tuple(norm and norm.weight for norm in (a.q_norm, a.k_norm))
        self.norm = (norms[0].eps, norms[0].norm) if norms else (0.0, "llama")
        shape = room.batch, self.kv_heads, room.max_length, a.head_dim
        like = {"dtype": room.dtype, "device": room.device}
        self.keys, self.values = (torch.zeros(shape, **like) for _ in range(2))

    def reset(self) -> None:
        """Nothing to do: what lies beyond the length is never read."""

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        a, sizes = self.attention, (self.heads, self.kv_heads, self.attention.head_dim)
        qkv = a.qkv_proj(x)
        angles = (None, None) if a.rope is None else place.angles[self.kind]
        q = OPS.qkv_rope_cache(
            *(qkv, self.keys, self.values, place.positions, *sizes, *angles),
            *(*self.weights, *self.norm, a.rope or "halves", a.gate, a.v_norm is not None),
        )
        gate = gate_view(qkv, self.heads, a.head_dim) if a.gate else None
        if q.shape[2] > FEW:
            out = self._prefill(q, place.start)
            out = out if gate is None else out * torch.sigmoid(gate)
        else:
            out = OPS.decode_attention(
                *(q, self.keys, self.values, place.length, a.scaling, a.sliding_window),
                *(a.softcap, a.sinks, gate),
            )
        return self.out_proj(out.flatten(-2))

    def _prefill(self, q: Tensor, start: int) -> Tensor:
        """q [B, H, T, d] over the cache's first start + T tokens → [B, T, H, d]."""
        a, end = self.attention, start + q.shape[2]
        k, v = self.keys[:, :, :end], self.values[:, :, :end]
        window = a.sliding_window if (a.sliding_window or end) < end else None
        if a.softcap is not None or a.sinks is not None:
            extra = {"softcap": a.softcap, "s_aux": a.sinks}
            mask = ops.causal_mask(q, k, window)
            return ops.eager_attention(a, q, k, v, mask, a.scaling, **extra)[0]
        whole = start == 0 and window is None
        out = F.scaled_dot_product_attention(
            *(q, k, v, None if whole else ops.causal_mask(q, k, window)),
            is_causal=whole, scale=a.scaling, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2)


class DeltaNet:
    """Gated DeltaNet with the convolution's last inputs [B, C, W − 1] and the state
    [B, nV, dk, dv] in float32 (float64 for float64 weights)."""

    def __init__(self, mixer: GatedDeltaNet, kind: str | None, room: Room):
        m = self.mixer = mixer
        self.heads = Heads(m.key_heads, m.value_heads, m.key_dim, m.value_dim)
        self.conv_weight = m.conv1d.weight.detach().squeeze(1)
        self.out_proj = linear(m.out_proj)
        like, device = {"dtype": room.dtype, "device": room.device}, room.device
        channels, width = self.conv_weight.shape
        self.past = torch.zeros(room.batch, channels, width - 1, **like)
        sizes = room.batch, m.value_heads, m.key_dim, m.value_dim
        self.state = torch.zeros(sizes, dtype=ops.wide(room.dtype), device=device)
        sizes = room.batch, m.key_heads, m.key_dim
        self.arrivals = torch.zeros(sizes, dtype=torch.int32, device=device)

    def reset(self) -> None:
        self.past.zero_()
        self.state.zero_()

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return self.out_proj(self._step(x) if place.start is None else self._prefill(x))

    def _step(self, x: Tensor) -> Tensor:
        """One token [B, 1, H] → [B, 1, nV·dv]."""
        m, x = self.mixer, x[:, 0]
        if hasattr(m, "in_proj"):
            qkvz, ba = (y := m.in_proj(x))[:, : -2 * m.value_heads], y[:, -2 * m.value_heads :]
        else:
            qkvz, ba = m.in_proj_qkvz(x), m.in_proj_ba(x)
        out = OPS.gated_delta_decode(
            *views(qkvz, ba, self.heads, m.layout),
            *(m.A_log, m.dt_bias, m.norm.weight, self.state, m.eps, m.layout == "tiled"),
            *(self.past, self.conv_weight, self.arrivals),
        )
        return out.flatten(1)[:, None]

    def _prefill(self, x: Tensor) -> Tensor:
        m = self.mixer
        qkv, z, b, a = m.project(x)
        qkv, past = OPS.causal_conv1d_prefill(qkv, self.conv_weight, self.past)
        keys = m.key_heads * m.key_dim
        q, k, v = qkv.split((keys, keys, m.value_heads * m.value_dim), -1)
        q, k = (t.unflatten(-1, (m.key_heads, m.key_dim)) for t in (q, k))
        tiled = m.layout == "tiled"
        out, state = OPS.delta_chunks(
            q, k, m._values(v), a, b, self.state, tiled, m.A_log, m.dt_bias
        )
        self.past.copy_(past)
        self.state.copy_(state)
        return ops.gated_rms_norm(out, z, m.norm.weight, m.eps).flatten(-2)


class MLP:
    """The gated feed-forward layer."""

    def __init__(self, mlp: GatedMLP):
        self.gate_up, self.down, self.act = mlp.gate_up_proj, linear(mlp.down_proj), mlp.act

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return self.down(self.gate_up.gated(x, self.act))


class MoE:
    """Routed experts and the shared one: one operation where a softmax chooses among weights that
    are stored plainly, module by module where not."""

    def __init__(self, moe: SparseMoE):
        self.moe, self.router = moe, softmax_router(moe.gate)
        shared = getattr(moe, "shared_expert", None) or getattr(moe, "shared_experts", None)
        self.shared = None if shared is None else MLP(shared)
        self.shared_gate = getattr(moe, "shared_expert_gate", None)
        self.weights = self._weights()

    def _weights(self) -> tuple[Any, ...] | None:
        """What sparse_moe takes after x."""
        router, experts, shared = self.router, self.moe.experts, (None, None)
        if not isinstance(router, SoftmaxRouter) or not isinstance(experts, Experts):
            return None
        if self.shared is not None:
            layers = self.shared.gate_up, self.shared.down
            if any(not is_plain(layer) for layer in layers) or self.shared.act != experts.act:
                return None
            shared = tuple(layer.weight for layer in layers)
        gate = None if self.shared_gate is None else self.shared_gate.weight
        stacks = experts.gate_up_proj, experts.down_proj, experts.act
        return router.weight, router.top_k, router.normalize, *stacks, *shared, gate

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        rows = x.flatten(0, -2)
        if self.weights is not None:
            return OPS.sparse_moe(rows, *self.weights).view_as(x)
        _, scores, index = self.router(rows)
        out = self.moe.experts(rows, index, scores)
        if self.shared is not None:
            extra = self.shared(rows, place)
            if self.shared_gate is not None:
                extra = torch.sigmoid(self.shared_gate(rows)) * extra
            out = out + extra
        return out.view_as(x)


def linear(layer: nn.Module) -> nn.Module:
    """A linear layer, plain or in FP8, as a FusedLinear of one part, whose product is ops.linear's;
    what is anything else stays."""
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    if type(layer) is not nn.Linear and "weight_scale_inv" not in tensors:
        return layer
    return FusedLinear.from_tensors({"whole": layer.weight.shape[0]}, tensors)


def is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLinear) and layer.format == Plain() and layer.bias is None


@torch.no_grad()
def softmax_router(router: nn.Module) -> nn.Module:
    """`router` as a SoftmaxRouter around its weight, if that is what it computes."""
    weight, k = getattr(router, "weight", None), getattr(router, "top_k", None)
    if weight is None or k is None:
        return router
    x = torch.randn(16, weight.shape[1], dtype=weight.dtype).to(weight.device)
    _, scores, index = router(x)
    for normalize in (True, False):
        ours = SoftmaxRouter(1, 1, k, normalize=normalize, device="meta")
        ours.weight = weight
        _, mine, places = ours(x)
        if torch.equal(places, index) and torch.equal(mine.to(scores.dtype), scores):
            return ours
    return router


def feed_forward(mlp: nn.Module) -> MLP | MoE:
    if isinstance(mlp, SparseMoE) or hasattr(mlp, "experts"):
        return MoE(mlp if isinstance(mlp, SparseMoE) else SparseMoE.from_parts(mlp))
    return MLP(mlp if isinstance(mlp, GatedMLP) else GatedMLP.from_parts(mlp))


def mixer(layer: nn.Module, *given: Any) -> Attention | DeltaNet:
    """The block for a layer's `self_attn` or `linear_attn`."""
    if hasattr(layer, "linear_attn"):
        part = layer.linear_attn
        if not isinstance(part, GatedDeltaNet):
            part = GatedDeltaNet.from_parts(part, one=not hasattr(part, "in_proj_ba"))
        return DeltaNet(part, *given)
    part = layer.self_attn
    if not isinstance(part, FusedAttention):
        part = FusedAttention.from_parts(part)
    return Attention(part, *given)
