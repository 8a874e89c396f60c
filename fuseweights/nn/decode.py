"""Decode with a loaded model: fused layers, static caches, one CUDA graph a token.

    decoder = Decoder(model, max_length=4096)
    tokens = decoder.generate(input_ids, max_new_tokens=100)

On a CPU the same steps run without a graph. What a layer of each architecture consists of is a row
of `DECODERS`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .decode_blocks import Place, Room, feed_forward, linear, mixer
from .norm import AddRMSNorm, RMSNorm
from .patch import patch_model


@dataclass(frozen=True)
class Row:
    """What the norms of a decoder layer are called: before and after the mixer (`self_attn` or
    `linear_attn`), before and after the `mlp`."""

    before_mixer: str = "input_layernorm"
    after_mixer: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


_SANDWICH = Row(
    after_mixer="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
DECODERS: dict[str, Row] = {
    name: row
    for names, row in {
        """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text
        qwen3_5_moe_text""": Row(),
        "gemma2 gemma3_text": _SANDWICH,
    }.items()
    for name in names.split()
}


class _Layer:
    """A decoder layer. The residual travels beside x, so that its add and the next norm are one
    kernel: (x, residual) → (x, residual), the layer's output being their sum."""

    def __init__(self, layer: nn.Module, row: Row, kind: str | None, room: Room):
        def norm(name: str | None, kind: type[RMSNorm]) -> RMSNorm | None:
            return name and kind.from_parts(getattr(layer, name))

        self.before_mixer = norm(row.before_mixer, AddRMSNorm)
        self.mixer = mixer(layer, kind, room)
        self.after_mixer = norm(row.after_mixer, RMSNorm)
        self.before_mlp = norm(row.before_mlp, AddRMSNorm)
        self.mlp = feed_forward(layer.mlp)
        self.after_mlp = norm(row.after_mlp, RMSNorm)

    def __call__(self, x: Tensor, residual: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        x, residual = self.before_mixer(x, residual)
        x = self.mixer(x, place)
        if self.after_mixer:
            x = self.after_mixer(x)
        x, residual = self.before_mlp(x, residual)
        x = self.mlp(x, place)
        return (self.after_mlp(x) if self.after_mlp else x), residual


class Decoder:
    """Greedy decoding, or the logits of one token at a time, with a transformers causal language
    model of one of `DECODERS`' architectures, loaded as usual or from a fused checkpoint.

    The model's layers are fused in place (`patch_model`) and shared; it keeps working. Keys, values
    and states of `batch` sequences, all of one length up to `max_length` tokens, belong to the
    Decoder. On CUDA a step is one graph replay: its logits [B, vocabulary] are overwritten by the
    next, and the token of highest logit is fed back on the device.

    Raises UsageError for an architecture or a layer that it does not know.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batch: int = 1, max_length: int = 4096):
        text, head = model.get_decoder(), model.get_output_embeddings()
        config = text.config
        row = DECODERS.get(config.model_type)
        if row is None or head is None:
            known = ", ".join(DECODERS)
            raise UsageError(
                f"Decoder does not know the layers of {config.model_type!r}",
                hint=f"It knows {known}, with their language-model head.",
            )
        patch_model(model)
        self.batch, self.max_length, self.length = batch, max_length, 0
        self.embed, self.norm = text.embed_tokens, AddRMSNorm.from_parts(text.norm)
        self.head, self.softcap = linear(head), getattr(config, "final_logit_softcapping", None)
        self.device, dtype = self.embed.weight.device, model.dtype
        kinds = getattr(config, "layer_types", None) or [None] * len(text.layers)
        self.ropes = {
            kind: rope_table(text.rotary_emb, kind, max_length, dtype, self.device)
            for kind in dict.fromkeys(kinds)
            if kind != "linear_attention"
        }
        room = Room(batch, max_length, dtype, self.device)
        self.layers = [
            _Layer(layer, row, kind, room) for layer, kind in zip(text.layers, kinds, strict=True)
        ]
        # the tokens so far, and where the next step reads its own: written by the step itself
        self.tokens = torch.zeros(batch, max_length + 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.graph = self._capture() if self.device.type == "cuda" else None

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0
        self.position.zero_()
        for layer in self.layers:
            layer.mixer.reset()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Append `ids` [B, T] and return the logits [B, vocabulary] after the last of them."""
        if ids.dim() != 2 or ids.shape[0] != self.batch or not ids.shape[1]:
            raise UsageError(f"expected tokens [{self.batch}, 1 or more], found {list(ids.shape)}")
        start, end = self.length, self._room_for(ids.shape[1])
        self.tokens[:, start:end] = ids
        positions = torch.arange(start, end, device=self.device)
        logits = self._forward(self.tokens[:, start:end], positions, start)
        self.tokens[:, end] = logits.argmax(-1)
        self.position.fill_(end)
        self.length = end
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Append one token [B] to each sequence; the logits [B, vocabulary] after it."""
        self._room_for(1)
        self.tokens[:, self.length] = token
        return self._advance()

    def generate(self, ids: Tensor, max_new_tokens: int, eos: int | None = None) -> Tensor:
        """`ids` [B, T] and up to `max_new_tokens` greedy tokens after them, from an empty cache.

        With `eos`, ends when every sequence has had that token, looking every 32 tokens; what
        follows it in a sequence is whatever came next.
        """
        self.reset()
        if ids.shape[1] + max_new_tokens > self.max_length + 1:
            raise UsageError(
                f"{ids.shape[1]} + {max_new_tokens} tokens are more than max_length = "
                f"{self.max_length}"
            )
        self.prefill(ids)
        for done in range(1, max_new_tokens):
            if eos is not None and done % 32 == 0:
                new = self.tokens[:, ids.shape[1] : self.length + 1]
                if (new == eos).any(1).all():
                    break
            self._advance()
        return self.tokens[:, : ids.shape[1] + max_new_tokens][:, : self.length + 1].clone()

    def _room_for(self, tokens: int) -> int:
        if self.length + tokens > self.max_length:
            raise UsageError(
                f"{self.length + tokens} tokens are more than max_length = {self.max_length}"
            )
        return self.length + tokens

    def _advance(self) -> Tensor:
        self.length = self._room_for(1)
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    @torch.no_grad()
    def _step(self) -> Tensor:
        """One token of every sequence, with nothing read on the host."""
        logits = self._forward(self.tokens.index_select(1, self.position), self.position, None)
        self.position += 1
        self.tokens.index_copy_(1, self.position, logits.argmax(-1, keepdim=True))
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, start: int | None) -> Tensor:
        angles = {
            kind: table.index_select(1, positions).split(1) for kind, table in self.ropes.items()
        }
        place = Place(positions, positions[-1:] + 1, start, angles)
        x, residual = self.embed(ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, place)
        x, _ = self.norm(x[:, -1], residual[:, -1])
        logits = self.head(x)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of one step: steps before it compile the kernels."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step()
        self.reset()
        return graph


def rope_table(
    rotary: nn.Module, kind: str | None, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """cos, then sin, [2, length, n], as the model's own rotary embedding gives them to a kind of
    layer."""
    types = getattr(rotary, "rope_type", "default")
    if (rope := types.get(kind) if isinstance(types, dict) else types) in ("dynamic", "longrope"):
        raise UsageError(f"Decoder does not know {rope} RoPE: its angles change with the length")
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    named = {"layer_type": kind} if by_kind else {}
    like = torch.empty(1, dtype=dtype, device=device)
    positions = torch.arange(length, device=device)[None]
    if hasattr(rotary, "mrope_section"):  # time, height and width are the same in text
        positions = positions.expand(3, 1, -1)
    return torch.cat(rotary(like, positions, **named))
