"""Export a fused Qwen3.5 decoder with ExecuTorch and run it there, beside PyTorch.

    python examples/export_executorch.py [OUT.pte]

Two small random layers, Gated DeltaNet and full attention with q|gate, each with its gated MLP and
its norms: transformers' own modules, fused by `from_parts`. The .pte has two methods, `prefill` for
a prompt and `decode` for one more token, that pass the layers' states to the caller. Its outputs
are compared with eager PyTorch's and with the unfused model's, token after token.

Needs torch, transformers and executorch (1.4.1 is the one for torch 2.13); no delegate.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5TextConfig, Qwen3_5TextModel

from fuseweights.nn import AddRMSNorm, FusedAttention, GatedDeltaNet, GatedMLP

PROMPT, STEPS, LONGEST = 70, 4, 256  # a prompt of more than one chunk of the delta rule
Step = Callable[..., Sequence[Tensor]]  # what Decoder.forward is


class States:
    """transformers' cache as the modules use it, without its own memory: two tensors a layer come
    in, two new ones go out."""

    def __init__(self, old: Sequence[Tensor]):
        self.old, self.new = old, []

    def _longer(self, at: int, x: Tensor, dim: int) -> Tensor:
        return torch.cat((self.old[at], x), dim) if self.old else x

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.new += [self._longer(2 * layer, k, 2), self._longer(2 * layer + 1, v, 2)]
        return self.new[-2], self.new[-1]

    def update_conv_state(self, x: Tensor, layer: int, conv_kernel_size: int) -> Tensor:
        x = self._longer(2 * layer, x, -1)
        self.new.append(x[..., -conv_kernel_size:])
        return x

    def get_recurrent_state(self, layer: int) -> Tensor | None:
        return self.old[2 * layer + 1] if self.old else None

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        self.new.append(state)


class Layer(nn.Module):
    """A decoder layer of Qwen3.5 from fused modules."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.input_layernorm = AddRMSNorm.from_parts(layer.input_layernorm)
        if layer.block_type == "linear_attention":
            self.mixer = GatedDeltaNet.from_parts(layer.linear_attn)
        else:
            self.mixer = FusedAttention.from_parts(layer.self_attn)
            self.mixer.config = None  # attention and its mask in plain PyTorch
        self.post_attention_layernorm = AddRMSNorm.from_parts(layer.post_attention_layernorm)
        self.mlp = GatedMLP.from_parts(layer.mlp)

    def forward(
        self, x: Tensor, residual: Tensor | None, rope: tuple[Tensor, Tensor], states: States
    ) -> tuple[Tensor, Tensor]:
        """The sum x + residual is the layer's input; the next one's, likewise, is the output."""
        x, residual = self.input_layernorm(x, residual)
        if isinstance(self.mixer, GatedDeltaNet):
            x = self.mixer(x, states)
        else:
            x, _ = self.mixer(x, rope, past_key_values=states)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """All layers and the last norm: x [B, T, H], cos and sin [B, T, n], then the states, none for a
    prompt → (output [B, T, H], new states)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, model.layers))
        self.norm = AddRMSNorm.from_parts(model.norm)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *old: Tensor) -> tuple[Tensor, ...]:
        states, residual = States(old), None
        for layer in self.layers:
            x, residual = layer(x, residual, (cos, sin), states)
        return self.norm(x, residual)[0], *(state.contiguous() for state in states.new)


def qwen() -> nn.Module:
    """A small random Qwen3.5 of transformers."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=8,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    model = Qwen3_5TextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:  # norms and decays: near their start
                parameter.add_(noise * 0.1)
    return model


def forward_substitution(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """linalg.solve_triangular, for which ExecuTorch has no kernel, from those that it has: one
    unknown row after the other is taken from all below it."""
    assert left and unitriangular and not upper
    a = a.tril(-1)
    for i in range(a.shape[-1] - 1):
        b = b - a[..., i : i + 1] * b[..., i : i + 1, :]
    return b


def export(decoder: Decoder, prompt: Sequence[Tensor], token: Sequence[Tensor]) -> Any:
    """The ExecuTorch program with both methods, traced with these inputs."""
    from executorch.exir import to_edge

    fixed, seen = {}, {2: torch.export.Dim("seen", min=1, max=LONGEST)}
    states = [
        fixed if isinstance(layer.mixer, GatedDeltaNet) else seen
        for layer in decoder.layers
        for _ in range(2)
    ]
    shapes = (fixed, fixed, fixed, tuple(states))
    programs = {
        "prefill": torch.export.export(decoder, tuple(prompt), strict=True),
        "decode": torch.export.export(decoder, tuple(token), dynamic_shapes=shapes, strict=True),
    }
    solve = {torch.ops.aten.linalg_solve_triangular.default: forward_substitution}
    return to_edge({n: p.run_decompositions(solve) for n, p in programs.items()}).to_executorch()


def load(path: Path) -> Step:
    """The .pte as a function like Decoder: without states `prefill`, with them `decode`."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    prefill, decode = (program.load_method(name) for name in ("prefill", "decode"))

    def run(*inputs: Tensor) -> list[Tensor]:
        method = prefill if len(inputs) == 3 else decode
        return [t.clone() for t in method.execute(inputs)]  # the next call reuses their memory

    return run


def unfused(model: nn.Module) -> Step:
    """transformers' model as a function like Decoder, with its own cache for the states."""
    cache = DynamicCache(config=model.config)

    def run(x: Tensor, *_: Tensor) -> list[Tensor]:
        out = model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        return [out.last_hidden_state]

    return run


def inputs(model: nn.Module) -> list[list[Tensor]]:
    """A prompt, then single tokens: x, cos and sin of each call."""
    torch.manual_seed(1)
    x = torch.randn(1, PROMPT + STEPS, model.config.hidden_size)
    rope = model.rotary_emb(x, torch.arange(x.shape[1]).expand(3, 1, -1))
    lengths = [PROMPT] + [1] * STEPS
    return [list(call) for call in zip(*(t.split(lengths, 1) for t in (x, *rope)), strict=True)]


@torch.no_grad()
def play(step: Step, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The output of every call; each gets the states that the one before it returned."""
    out, states = [], []
    for call in calls:
        y, *states = step(*call, *states)
        out.append(y)
    return out


def distances(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    """‖a − b‖ / ‖b‖ of every call."""
    pairs = zip(ours, theirs, strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]


def main(path: Path) -> dict[str, list[float]]:
    """Export to `path`, run it there, and return the distances of every call: what → numbers."""
    model = qwen()
    decoder, calls = Decoder(model), inputs(model)
    with torch.no_grad():
        _, *states = decoder(*calls[0])
    program = export(decoder, calls[0], [*calls[1], *states])
    path.write_bytes(program.buffer)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    for plan in program.executorch_program.execution_plan:
        kernels = len(plan.chains[0].instructions)
        print(f"{plan.name}: {kernels} kernel calls of {len(plan.operators)} operators")

    ran, eager = play(load(path), calls), play(decoder, calls)
    exact = play(copy.deepcopy(decoder).double(), [[t.double() for t in c] for c in calls])
    found = {
        "executorch - fused": distances(ran, eager),
        "executorch - transformers": distances(ran, play(unfused(model), calls)),
        "executorch - float64": distances(ran, exact),
        "fused - float64": distances(eager, exact),
    }
    print(f"{'relative distance':27}{PROMPT} tokens, then one at a time")
    for what, values in found.items():
        print(f"{what:27}{'  '.join(f'{value:.1e}' for value in values)}")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(scratch, "qwen3_5.pte")))
