"""Weight files: what lies in them, read without running any code, and written whole or not at all."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import ModelError

# The original's backbone names -> timm's. The head's are the same in both.
RENAMES = (
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.layers\.(\d+)\.ln([12])\.", r"backbone.blocks.\1.norm\2."),
    (r"^backbone\.layers\.(\d+)\.attn\.", r"backbone.blocks.\1.attn."),
    (r"^backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.", r"backbone.blocks.\1.mlp.fc1."),
    (r"^backbone\.layers\.(\d+)\.ffn\.layers\.1\.", r"backbone.blocks.\1.mlp.fc2."),
    (r"^backbone\.ln1\.", "backbone.norm."),
)


def rename_key(key: str) -> str:
    """The name of a parameter in the original (`backbone.layers.0.ln1.weight`) -> ours; ours stay as they are."""
    for pattern, replacement in RENAMES:
        key, changed = re.subn(pattern, replacement, key)
        if changed:
            break
    return key


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file on the CPU, under our names, otherwise as they lie in the file.

    Knows the original's segmentation files, its pre-training files (no prefix, with cls_token) and our own. Raises
    ModelError for a file that is missing, damaged, not weights, or that only loads by running pickled code.
    """
    path = _existing(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ModelError(f"{path}: {path.suffix or 'no suffix'} is no weight format, give a .pth, .pt or .safetensors")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise ModelError(f"{path}: holds no state dict of tensors, save the model's state_dict() alone")
    prefix = "" if any(key.startswith(("backbone.", "decode_head.")) for key in state) else "backbone."
    return {rename_key(prefix + key): value for key, value in items}


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such weight file, check the path")
    return Path(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole .safetensors file, copy or download it again ({error})") from None


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)  # torch.save's format since 1.6, and the only one that can be memory-mapped
    try:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if is_zip else []
        if not foreign:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError):
        raise ModelError(f"{path}: damaged, or not torch.save's: copy it again or save its state_dict alone") from None
    raise ModelError(
        f"{path}: refused, loading it would run pickled code ({', '.join(foreign[:3])}); clean it where it was made: "
        "torch.save({'state_dict': checkpoint['state_dict']}, 'clean.pth')"
    )


def save_safetensors(path: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata (anything JSON can hold) to one file that is either whole or not there.

    metadata's keys: arch, image_size, patch_padding, num_classes, label_set, origin, step.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    beside.unlink(missing_ok=True)
    beside.touch()
    mode = beside.stat().st_mode
    save_file(tensors, beside, {key: _encode(value) for key, value in metadata.items()} | {"format": "pt"})
    beside.chmod(mode)  # safetensors lets nobody but the owner read
    _sync(beside)
    beside.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: Any) -> str:
    # A string goes in as it is, unless it would come out as something else: "12", "true".
    return value if isinstance(value, str) and _decode(value) == value else json.dumps(value)


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What save_safetensors was given as metadata; empty for a file that has none, as every .pth.

    Raises ModelError for a file that is missing or damaged.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole .safetensors file, copy or download it again ({error})") from None
    return {key: _decode(value) for key, value in stored.items() if key != "format"}
