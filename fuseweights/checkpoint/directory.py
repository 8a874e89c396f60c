"""Hugging Face checkpoints: a directory of safetensors with its index and configuration, or one
bare file. Symlinks of the hub's cache are followed for reading; nothing is written through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CorruptError
from .model import Checkpoint, SourceFile, Tensor
from .safetensors import SafetensorsFile, parse_object, read_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANTIZE = "quantize_config.json"
MODELOPT = "hf_quant_config.json"
CONFIGS = (CONFIG, QUANTIZE, MODELOPT)
MAX_JSON = 100_000_000
# Weights in other formats, and what a training run leaves behind, are not part of the checkpoint.
LEFT_BEHIND = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pkl", ".ot", ".tflite", ".mlmodel", ".npz",
)  # fmt: skip


@dataclass(frozen=True)
class HFCheckpoint(Checkpoint):
    """`texts` are the JSON files that speak of tensors and modules, `index` what the index holds
    beside weight_map; `extras` every other file that comes along, with its name below the
    directory. `bare` is a file without a directory."""

    texts: Mapping[str, str] = field(default_factory=dict)
    index: Mapping[str, Any] | None = None
    extras: tuple[tuple[str, SourceFile], ...] = ()
    bare: bool = False

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        return (*(file.path for file in self.files), *(file.path for _, file in self.extras))

    @cached_property
    def config(self) -> dict[str, Any]:
        return _json(self.texts.get(CONFIG, "{}"), self.root / CONFIG)

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that speaks of the text model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def layers(self) -> int | None:
        count = self.text_config.get("num_hidden_layers")
        return count if type(count) is int else None

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """quantization_config, wherever this checkpoint keeps it; empty when it has none."""
        for config in (self.config, self.text_config):
            found = config.get("quantization_config") or config.get("compression_config")
            if isinstance(found, dict):
                return found
        modelopt = _json(self.texts.get(MODELOPT, "{}"), self.root / MODELOPT).get("quantization")
        if isinstance(modelopt, dict):
            return {**modelopt, "quant_method": "modelopt"}
        gptq = _json(self.texts.get(QUANTIZE, "{}"), self.root / QUANTIZE)
        return {"quant_method": "gptq", **gptq} if gptq else {}


def open_directory(root: Path) -> HFCheckpoint:
    """Read the index and every header of the checkpoint in `root`.

    Raises CorruptError: no safetensors, an index that names files outside or absent, a tensor in
    two files, in a file but not in the index or the other way round.
    """
    texts = {name: _text(root / name) for name in CONFIGS if (root / name).is_file()}
    index = None
    if (root / SINGLE).is_file():
        names = [SINGLE]
    elif (root / INDEX).is_file():
        texts[INDEX] = _text(root / INDEX)
        index = _json(texts[INDEX], root / INDEX)
        names = _indexed_files(_weight_map(index, root), root)
    else:
        raise CorruptError(f"{root}: has neither {SINGLE} nor {INDEX}", hint=_what_is_there(root))
    files = tuple(read_file(root / name, number) for number, name in enumerate(names))
    tensors = _gather(files)
    if index is not None:
        _check_index(_weight_map(index, root), files, root)
        index["weight_map"] = {}  # says nothing that the files do not say; can be large
    extras = tuple(
        (name, SourceFile(**SourceFile.identity(root / name)))
        for name in _other_files(root, {*texts, *names})
    )
    return _checkpoint(root, files, tensors, texts, index, extras, False)


def open_file(path: Path) -> HFCheckpoint:
    """One bare safetensors file; the configuration beside it, if any, tells the architecture."""
    files = (read_file(path, 0),)
    texts = {
        name: _text(path.with_name(name)) for name in CONFIGS if path.with_name(name).is_file()
    }
    return _checkpoint(path, files, _gather(files), texts, None, (), True)


def _checkpoint(
    root: Path,
    files: tuple[SafetensorsFile, ...],
    tensors: dict[str, Tensor],
    texts: dict[str, str],
    index: dict[str, Any] | None,
    extras: tuple[tuple[str, SourceFile], ...],
    bare: bool,
) -> HFCheckpoint:
    configs = {name: _json(texts[name], root / name) for name in CONFIGS if name in texts}
    config = configs.get(CONFIG, {})
    architecture = config.get("model_type", "")
    if not isinstance(architecture, str):
        raise CorruptError(f"{root / CONFIG}: model_type is not a string")
    return HFCheckpoint(
        "safetensors",
        root,
        files,
        tensors,
        architecture,
        texts=texts,
        index=index,
        extras=extras,
        bare=bare,
    )


def _gather(files: tuple[SafetensorsFile, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in tensors:
                first = files[tensors[tensor.name].file].path.name
                raise CorruptError(f"{file.path}: tensor {tensor.name!r} is in {first} too")
            tensors[tensor.name] = tensor
    return tensors


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_JSON:
        raise CorruptError(f"{path}: {size} bytes of JSON, at most {MAX_JSON} are read")
    try:
        with open(path, encoding="utf-8", newline="") as file:  # line ends as they are
            return file.read()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path}: is not UTF-8: {error}") from None


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        return parse_object(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is not a JSON object: {error}") from None


def _weight_map(index: Mapping[str, Any], root: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or any(type(v) is not str for v in weight_map.values()):
        raise CorruptError(f"{root / INDEX}: weight_map is not an object of file names")
    return weight_map


def _indexed_files(weight_map: Mapping[str, str], root: Path) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or PurePosixPath(name).name != name or "\\" in name:
            raise CorruptError(f"{root / INDEX}: weight_map leaves the directory with {name!r}")
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        shown = ", ".join(missing[:10]) + (" …" if len(missing) > 10 else "")
        raise CorruptError(f"{root}: {len(missing)} files of the index are missing: {shown}")
    if not names:
        raise CorruptError(f"{root / INDEX}: weight_map is empty")
    return names


def _check_index(
    weight_map: Mapping[str, str], files: tuple[SafetensorsFile, ...], root: Path
) -> None:
    stored = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    wrong = [name for name in {**weight_map, **stored} if weight_map.get(name) != stored.get(name)]
    if wrong:
        name = min(wrong)
        raise CorruptError(
            f"{root / INDEX}: disagrees with the files on {len(wrong)} tensors: {name!r} is in "
            f"{stored.get(name, 'none')}, the index says {weight_map.get(name, 'none')}"
        )


def _other_files(root: Path, known: set[str]) -> list[str]:
    """Every other file that belongs to the checkpoint, by its name below `root`."""
    names = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden and name not in known:
            low = name.lower()
            if not low.endswith(LEFT_BEHIND) and not path.name.startswith("consolidated"):
                names.append(name)
    return names


def _what_is_there(root: Path) -> str:
    """What to do about a directory without safetensors weights."""
    if list(root.glob("adapter_model.*")) or (root / "adapter_config.json").exists():
        return "It holds a LoRA adapter: merge it into its base model first."
    if ggufs := sorted(root.glob("*.gguf")):
        return f"Give the GGUF file itself, e.g. {ggufs[0].name}."
    if list(root.glob("*.bin")) or list(root.glob("*.pt*")):
        return "It holds pickled weights: save them as safetensors first (save_pretrained does)."
    if others := sorted(root.glob("*.safetensors")):
        return f"Give the file itself, e.g. {others[0].name}."
    return "Give a directory with safetensors weights, or a GGUF file."
