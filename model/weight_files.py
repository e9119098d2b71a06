"""Weight files: what lies in them, read without running any code, and written whole or not at all."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import ModelError

HUB = "hf-hub:"
SUFFIXES = (".pth", ".pt", ".safetensors")
META = "sapiens_seg"  # the key under which our export to an original's .pth keeps what it knows

# The backbone's names in the originals, and timm's, which are ours; {} is a block's number. The head's are the same.
SAPIENS_NAMES = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("layers.{}.ln1.", "blocks.{}.norm1."),
    ("layers.{}.ln2.", "blocks.{}.norm2."),
    ("layers.{}.attn.", "blocks.{}.attn."),
    ("layers.{}.ffn.layers.0.0.", "blocks.{}.mlp.fc1."),
    ("layers.{}.ffn.layers.1.", "blocks.{}.mlp.fc2."),
    ("ln1.", "norm."),
)
SAPIENS2_NAMES = (
    ("storage_tokens", "reg_token"),
    ("patch_embed.projection.", "patch_embed.proj."),
    ("blocks.{}.ln1.", "blocks.{}.norm1."),
    ("blocks.{}.ln2.", "blocks.{}.norm2."),
    ("blocks.{}.attn.wq.", "blocks.{}.attn.q_proj."),
    ("blocks.{}.attn.wk.", "blocks.{}.attn.k_proj."),
    ("blocks.{}.attn.wv.", "blocks.{}.attn.v_proj."),
    ("blocks.{}.attn.gamma.weight", "blocks.{}.gamma_1"),
    ("blocks.{}.ffn.w12.", "blocks.{}.mlp.fc1."),
    ("blocks.{}.ffn.w3.", "blocks.{}.mlp.fc2."),
    ("rope_embed.periods", "rope.periods"),
    ("ln1.", "norm."),
)
NAMES = {"sapiens": SAPIENS_NAMES, "sapiens2": SAPIENS2_NAMES}


def rename_key(key: str) -> str:
    """A parameter's name in either original (`backbone.layers.0.ln1.weight`) -> ours; ours stay as they are."""
    for names in NAMES.values():
        key = _rename(key, names)
    return key


def original_key(key: str, family: str) -> str:
    """The inverse of rename_key: our name of a parameter -> that in the original of a family, "sapiens" or "sapiens2"."""
    return _rename(key, tuple((ours, theirs) for theirs, ours in NAMES[family]))


def _rename(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        pattern = "^backbone\\." + re.escape(old).replace(r"\{\}", r"(\d+)")
        renamed, changed = re.subn(pattern, "backbone." + new.replace("{}", r"\1"), key)
        if changed:
            return renamed
    return key


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file on the CPU, under our names, otherwise as they lie in the file.

    Knows the segmentation and pre-training files (no prefix) of both originals, timm's of the same backbones, and our own.
    Raises ModelError for a file that is missing, damaged, not weights, or that only loads by running pickled code.
    """
    path = _existing(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise ModelError(f"{path}: holds no state dict of tensors, save the model's state_dict() alone")
    prefix = "" if any(key.startswith(("backbone.", "decode_head.")) for key in state) else "backbone."
    return {rename_key(prefix + key): value for key, value in items}


def locate_weights(path: str | Path) -> Path:
    """A local file for `path`, which may be `hf-hub:OWNER/NAME`, optionally with `/FILE` and `@REVISION`.

    Downloads into the Hugging Face cache what isn't there yet. Raises ModelError if there is no such file, or if the
    repository holds several and none is named.
    """
    if not str(path).startswith(HUB):
        return _existing(path)
    from huggingface_hub import HfApi, hf_hub_download

    name, _, revision = str(path).removeprefix(HUB).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    try:
        if not file:
            listed = HfApi().list_repo_files(f"{owner}/{repository}", revision=revision or None)
            known = [one for one in listed if one.endswith(SUFFIXES)]
            if len(known) != 1:
                raise ModelError(f"{path}: holds {len(known)} weight files, name one: {HUB}{owner}/{repository}/FILE; {known}")
            file = known[0]
        return _existing(hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except ModelError:
        raise
    except Exception as error:  # the hub's own errors, its HTTP library's, the disk's
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{path}: not to be had from the hub, check the name and the network; a file named with /FILE is taken from the "
            f"cache without a network ({reason})"
        ) from None


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weight file, check the path")
    if path.suffix not in SUFFIXES:
        raise ModelError(f"{path}: {path.suffix or 'no suffix'} is no weight format, give a .pth, .pt or .safetensors")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole .safetensors file, copy or download it again ({error})") from None


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)  # torch.save's format since 1.6, and the only one that can be memory-mapped
    try:
        if is_zip and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            raise ModelError(f"{path}: a TorchScript program, not weights; give the file that it was exported from")
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if is_zip else []
        if not foreign:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (ModelError, MemoryError):
        raise
    except Exception:  # a damaged pickle raises nearly anything
        raise ModelError(f"{path}: damaged, or not torch.save's: copy it again or save its state_dict alone") from None
    raise ModelError(
        f"{path}: refused, loading it would run pickled code ({', '.join(foreign[:3])}); clean it where it was made: "
        "torch.save({'state_dict': checkpoint['state_dict']}, 'clean.pth')"
    )


def save_safetensors(path: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata (anything JSON can hold) to one file that is either whole or not there.

    metadata's keys: Segmenter.describe's, and keep_aspect, label_set, origin, step, revision, ema_decay.
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
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Until a file, or the names in a folder, are on the disk."""
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
    """What save_safetensors, or our export to a .pth, was given as metadata; empty for a file that has none.

    Of an original's .pth, label_set with the class names alone, if it tells them. Raises ModelError for a file that is
    missing or damaged.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        content = _read_torch(path)
        meta = content.get("meta") if isinstance(content, dict) else None
        meta = meta if isinstance(meta, dict) else {}
        dataset, ours = meta.get("dataset_meta"), meta.get(META)
        names = dataset.get("classes") if isinstance(dataset, dict) else None
        named = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
        found = {"label_set": {"classes": [{"id": i, "name": name} for i, name in enumerate(names)]}} if named else {}
        return _checked(found | (ours if isinstance(ours, dict) else {}), path)
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole .safetensors file, copy or download it again ({error})") from None
    return _checked({key: _decode(value) for key, value in stored.items() if key != "format"}, path)


def is_label_set(value: Any) -> bool:
    """Whether a model can use it: names, colours and flip pairs, as far as they are there, are such."""
    if not isinstance(value, dict) or not isinstance(value.get("classes", []), list):
        return False
    classes, pairs = value.get("classes", []), value.get("flip_pairs", [])
    return (
        all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in classes)
        and all(_are_numbers(entry.get("color", [0, 0, 0]), 3, 256) for entry in classes)
        and isinstance(pairs, list)
        and all(_are_numbers(pair, 2, len(classes)) for pair in pairs)
    )


def _are_numbers(value: Any, count: int, end: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and 0 <= n < end for n in value)


METADATA = {
    "arch": lambda value: isinstance(value, str),
    "image_size": lambda value: _are_numbers(value, 2, 2**20) and min(value) > 0,
    "patch_padding": lambda value: type(value) is int,
    "rope_precision": lambda value: isinstance(value, str),
    "num_classes": lambda value: type(value) is int,
    "label_set": is_label_set,
}


def _checked(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    for key, is_right in METADATA.items():
        if key in metadata and not is_right(metadata[key]):
            given = repr(metadata[key])[:80]
            raise ModelError(f"{path}: metadata: {key}: {given} is none; give a file that training or model.export wrote")
    return metadata
