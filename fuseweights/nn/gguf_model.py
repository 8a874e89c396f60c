"""A transformers model whose linear layers hold the blocks of a GGUF file as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..api import open_checkpoint
from ..checkpoint.ggml import TENSOR_TYPE_IDS
from ..checkpoint.model import Checkpoint
from ..checkpoint.pieces import Sources
from ..errors import UsageError
from ..rules import gguf, gguf_models
from .attention import FusedAttention
from .blocks import BlockEmbedding, BlockExperts, MixedLinear
from .delta_net import GatedDeltaNet
from .gguf_config import architecture_of, read_config
from .linear import FusedLinear
from .load import DTYPES, read_tensor
from .mlp import GatedMLP, activation_of
from .moe import Experts, SparseMoE
from .norm import RMSNorm
from .weights import GGUFBlocks, Plain

FUSED = {rule.fused: rule.parts for rule in gguf.RULES}


def load_model(
    path: str | PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A transformers model from a GGUF file, or any file of a split set, fused or not.

    Linear layers, experts, embeddings and the output head hold the file's blocks; what stacks
    exactly is stacked while it is read. Everything else, and the activations, are `dtype`:
    bfloat16 on a GPU, float32 elsewhere. Peak memory is the model and one tensor.

    Raises UsageError for an architecture without a row in rules/gguf_models.py, and for tensors
    that have no place in the model or are missing, all at once.
    """
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with Sources(checkpoint.paths) as sources:
        _Loader(checkpoint, sources, model, device, dtype).run()
    return model.eval()


class _Loader:
    """Fills one model from one checkpoint, and accounts for every tensor of both."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sources: Sources,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.checkpoint, self.sources, self.model = checkpoint, sources, model
        self.row = architecture_of(checkpoint)
        self.device, self.dtype = device, dtype
        self.left = dict(checkpoint.tensors)
        for name in [name for name in self.left if self._is_draft(name)]:
            del self.left[name]

    def run(self) -> None:
        for number, layer in enumerate(self.model.model.layers):
            _swap_modules(layer, self.row.turned)
            self._fill_layer(layer, f"blk.{number}.")
        self.model.model.norm = _norm(self.model.model.norm)
        for path, name in self.row.top.items():
            if _has(self.model, path):
                self._fill(self.model, path, name)
        self._fill_rotary()
        self._fill_embeddings()
        missing = [
            name
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if tensor.is_meta
        ]
        problems = [f"{name} has no place in the model" for name in self.left]
        problems += [f"{name} is not in the file" for name in missing]
        if problems:
            raise UsageError(f"{self.checkpoint.root}: " + "; ".join(problems))

    def _is_draft(self, name: str) -> bool:
        """Layers after the model's own draft tokens ahead; transformers has no place for them."""
        _, _, rest = name.partition("blk.")
        number = rest.partition(".")[0]
        return number.isdigit() and int(number) >= self.model.config.num_hidden_layers

    def _fill_layer(self, layer: nn.Module, prefix: str) -> None:
        for path, parts in gguf_models.LINEAR.items():
            old = _at(layer, path)
            if isinstance(old, FusedLinear | nn.Linear):
                _put(layer, path, self._linear(old, [prefix + part for part in parts]))
        for parent in (layer, getattr(layer, "mlp", None)):
            if isinstance(getattr(parent, "experts", None), nn.Module):
                parent.experts = self._experts(parent.experts, prefix)
        for path, name in self.row.layer.items():
            if _has(layer, path):
                self._fill(layer, path, prefix + name)

    # Tensors

    def _take(self, name: str) -> tuple[Tensor, str]:
        """A tensor on the device, and its type: blocks as bytes [..., bytes a row]."""
        tensor = self.left.pop(name)
        values = read_tensor(tensor, self.sources)
        return values.to(self.device), tensor.dtype

    def _numbers(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        values, kind = self._take(name)
        if kind not in DTYPES:
            shape = self.checkpoint.tensors[name].shape
            values = _format(kind).dequantize({"weight": values.flatten(0, -2)}, torch.float32)
            values = values.view(shape)
        return values.to(dtype or self.dtype)

    def _fill(self, root: nn.Module, path: str, name: str) -> None:
        """One parameter or buffer, in the shape and meaning that the model gives it."""
        owner, _, leaf = path.rpartition(".")
        owner = root.get_submodule(owner)
        meta = getattr(owner, leaf)
        if name not in self.left:
            return
        wide = isinstance(owner, RMSNorm) and owner.norm != "llama"
        values = self._numbers(name, torch.float32 if wide or leaf == "A_log" else None)
        if leaf == "A_log":
            values = (-values).log()  # the file has −exp(A_log)
        _set(owner, leaf, values.reshape(meta.shape))

    # Linear layers

    def _cover(self, parts: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        """Tensors of the file (without suffix) that hold `parts` in order, each with the parts it
        holds: a part itself, or several that were fused before."""
        prefix, at = "".join(parts[0].rpartition(".")[:2]), 0
        names = [part.removeprefix(prefix) for part in parts]
        while at < len(names):
            held = [
                (fused, list(of))
                for fused, of in FUSED.items()
                if list(of) == names[at : at + len(of)]
                and prefix + fused + ".weight" in self.left
                and prefix + of[0] + ".weight" not in self.left
            ]
            # attn_qkv is a part by itself in Gated DeltaNet layers
            name, of = held[0] if held else (names[at], [names[at]])
            if prefix + name + ".weight" in self.left:
                yield prefix + name, of
            at += len(of)

    def _linear(self, old: FusedLinear | nn.Linear, parts: list[str]) -> nn.Module:
        """`old` around the blocks of `parts`: one stack where all types agree, else a stack for
        each run of parts that do."""
        sections = getattr(old, "sections", None) or {"weight": old.weight.shape[0]}
        names = dict(zip((part.rpartition(".")[2] for part in parts), sections, strict=False))
        if len(parts) > len(sections):  # a file may have v where the model expects v = k
            names[parts[2].rpartition(".")[2]] = "v_proj"
            sections = {**sections, "v_proj": sections["k_proj"]}
        runs: list[tuple[str, dict[str, Any], list[str]]] = []
        for name, of in self._cover(parts):
            kind = self.left[name + ".weight"].dtype
            held = {names[part]: sections[names[part]] for part in of}
            if runs and runs[-1][0] == kind:
                runs[-1][1].update(held)
                runs[-1][2].append(name)
            else:
                runs.append((kind, held, [name]))
        if not runs:
            return old
        stacks = [FusedLinear.from_tensors(held, *self._stacked(of)) for _, held, of in runs]
        return stacks[0] if len(stacks) == 1 else MixedLinear(stacks)

    def _stacked(self, names: list[str]) -> tuple[dict[str, Tensor], Any]:
        taken = [self._take(name + ".weight") for name in names]
        format, kind = _format(taken[0][1]), taken[0][1]
        # a vector is a matrix of one row (the shared expert's gate)
        weights = [w if w.dim() > 1 else w[None] for w, _ in taken]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if kind in DTYPES:
            weight = weight.to(self.dtype)
        elif self.device.type == "cuda":
            format, weight = format.planar(weight)
        tensors = {"weight": weight}
        if names[0] + ".bias" in self.left:
            tensors["bias"] = torch.cat([self._numbers(name + ".bias") for name in names])
        return tensors, format

    def _experts(self, old: nn.Module, prefix: str) -> nn.Module:
        act = old.act if isinstance(old, Experts) else activation_of(old.act_fn)
        stacks, formats = {}, {}
        for path, parts in gguf_models.EXPERTS.items():
            taken = [self._take(f"{name}.weight") for name, _ in self._cover(
                [prefix + part for part in parts]
            )]  # fmt: skip
            kinds = {kind for _, kind in taken}
            if len(kinds) > 1:
                raise UsageError(f"{prefix}: {' and '.join(parts)} are {' and '.join(kinds)}")
            kind = kinds.pop()
            stacks[path] = torch.cat([w for w, _ in taken], 1) if len(taken) > 1 else taken[0][0]
            formats[path] = _format(kind)
            if kind in DTYPES:
                stacks[path] = stacks[path].to(self.dtype)
        blocks = all(isinstance(format, GGUFBlocks) for format in formats.values())
        if self.device.type == "cuda" and blocks:  # kernels take both in one order
            moved = {path: formats[path].planar(stacks[path]) for path in stacks}
            if all(format.is_planar for format, _ in moved.values()):
                formats = {path: format for path, (format, _) in moved.items()}
                stacks = {path: stack for path, (_, stack) in moved.items()}
        return BlockExperts(stacks, formats, act)

    # What is not in layers

    def _fill_rotary(self) -> None:
        """Rotary modules compute their buffers when they are made; `rope_freqs` divides them."""
        rotary = self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
        if "rope_freqs.weight" in self.left:
            factors = self._numbers("rope_freqs.weight", torch.float32).cpu()
            for name, values in rotary.named_buffers():
                if name.endswith("inv_freq") and not name.startswith("sliding"):
                    values.copy_(values / factors)
        rotary.to(self.device)

    def _fill_embeddings(self) -> None:
        for path, name in gguf_models.EMBEDDINGS.items():
            old = _at(self.model, path)
            if old is None or name not in self.left:
                continue
            weight, kind = self._take(name)
            scale = getattr(old, "scalar_embed_scale", None)
            if kind in DTYPES:
                weight = weight.to(self.dtype)
            table = BlockEmbedding(weight, _format(kind), self.dtype, scale)
            _put(self.model, path, table)
        for path, name in gguf_models.TOP_LINEAR.items():
            if (old := _at(self.model, path)) is not None:
                _put(self.model, path, self._linear(old, [name.removesuffix(".weight")]))
        table = self.model.model.embed_tokens
        rows = {"lm_head": table.num_embeddings}
        if "output.weight" in self.left:
            self.model.lm_head = FusedLinear.from_tensors(rows, *self._stacked(["output"]))
        else:
            tied = {"weight": table.weight}
            self.model.lm_head = FusedLinear.from_tensors(rows, tied, table.format)
            self.model.lm_head.weight = table.weight


def _swap_modules(layer: nn.Module, turned: bool) -> None:
    """Our modules in place of the layer's: they take blocks, and kernels."""
    if hasattr(layer, "linear_attn"):
        layer.linear_attn = GatedDeltaNet.from_parts(layer.linear_attn)
        layer.linear_attn.layout = "tiled"
    elif hasattr(layer.self_attn, "k_proj"):  # without: it reads another layer's keys
        layer.self_attn = FusedAttention.from_parts(layer.self_attn)
        if turned:
            layer.self_attn.rope = "glm"
    for name, module in list(layer.named_modules()):
        weighted = getattr(module, "weight", None) is not None
        if weighted and type(module).__name__.endswith("RMSNorm"):
            _put(layer, name, _norm(module))
    layer.mlp = (SparseMoE if hasattr(layer.mlp, "experts") else GatedMLP).from_parts(layer.mlp)


def _norm(norm: nn.Module) -> RMSNorm:
    """Norms of the form 1 + w are stored so: the sum is the weight."""
    ours = norm if isinstance(norm, RMSNorm) else RMSNorm.from_parts(norm)
    if ours.norm == "gemma":
        ours.norm = "late"
    return ours


def _format(kind: str) -> Any:
    return Plain() if kind in DTYPES else GGUFBlocks(TENSOR_TYPE_IDS[kind])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for segment in path.split("."):
        module = getattr(module, "_modules", {}).get(segment)
    return module


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(owner), leaf, module)


def _has(root: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    module = _at(root, owner) if owner else root
    return isinstance(getattr(module, leaf, None), Tensor)


def _set(owner: nn.Module, leaf: str, values: Tensor) -> None:
    if leaf in owner._buffers:
        owner._buffers[leaf] = values
    else:
        setattr(owner, leaf, _frozen(values))
