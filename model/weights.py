"""Weights into a model, with a report of what became of every key; and a model out of one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelError
from model.archs import ARCHS
from model.backbone import infer_grid, resize_position_embedding
from model.segmenter import Segmenter, build_segmenter
from model.weight_files import read_metadata, read_weights, rename_key, save_safetensors

__all__ = [
    "LoadReport",
    "load_segmenter",
    "load_weights",
    "read_metadata",
    "read_weights",
    "rename_key",
    "save_safetensors",
]

POS_EMBED = "backbone.pos_embed"
CLS_TOKEN = "backbone.cls_token"


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a weight file and of the model it was loaded into; keys are the model's names.

    resized and reinitialised map a key to what happened to it. The missing keys, which the file lacks, are among the
    reinitialised; the unused are the file's own surplus.
    """

    path: Path
    loaded: tuple[str, ...]
    resized: dict[str, str]
    reinitialised: dict[str, str]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """A table: each category's count, then one line for each key that wasn't simply loaded."""
        lines = [f"weights from {self.path}"]
        for name in ("loaded", "resized", "reinitialised", "unused", "missing"):
            keys = getattr(self, name)
            lines.append(f"  {name:<14}{len(keys):>5}")
            if name in ("resized", "reinitialised"):
                lines += [f"    {key}: {what}" for key, what in keys.items()]
            elif name == "unused":
                lines += [f"    {key}" for key in keys]
        return "\n".join(lines)


def load_weights(model: Segmenter, path: str | Path) -> LoadReport:
    """Fill `model`, in place, from a file of any kind that read_weights knows.

    The position embedding is resized to the model's grid. conv_seg is drawn anew if the file has another number of
    classes, and the whole head if the file has none. Raises ModelError if the file doesn't cover the whole backbone,
    belongs to another architecture, or has a head of another shape.
    """
    path = Path(path)
    state, metadata = read_weights(path), read_metadata(path)
    own = model.state_dict()
    assert not any(tensor.is_meta for tensor in own.values()), "load_weights needs a model with real tensors"
    if metadata.get("patch_padding", model.patch_padding) != model.patch_padding:
        raise ModelError(
            f"{path}: was trained with patch_padding {metadata['patch_padding']}, set it so for the model too, "
            f"which has {model.patch_padding}"
        )
    _check_backbone(model, state, own, path)
    resized = _fit_position_embedding(model, state, metadata, path)
    reinitialised = _fit_head(model, state, own, path)
    missing = tuple(key for key in own if key not in state and key in reinitialised)
    loaded = {key: value for key, value in state.items() if key in own and key not in reinitialised}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        path=path,
        loaded=tuple(loaded),
        resized=resized,
        reinitialised=reinitialised,
        unused=tuple(key for key in state if key not in own),
        missing=missing,
    )


def _check_backbone(model: Segmenter, state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    wrong = [
        key
        for key in own
        if key.startswith("backbone.")
        and (key not in state or (key != POS_EMBED and state[key].shape != own[key].shape))
    ]
    # A deeper model's file would cover a shallower one, with its last layers cut off.
    wrong += [key for key in state if key.startswith("backbone.blocks.") and key not in own]
    if wrong:
        raise ModelError(
            f"{path}: does not fit the backbone of {model.arch.name}, {len(wrong)} keys are missing, surplus or of "
            f"another shape ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}); it looks like "
            f"{_describe_arch(state)}: is the arch the right one?"
        )


def _describe_arch(state: dict[str, Tensor]) -> str:
    patches = state.get("backbone.patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return f"no vision transformer (first keys: {', '.join(list(state)[:3])})"
    embed_dim, patch = patches.shape[0], patches.shape[-1]
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.blocks.")})
    for arch in ARCHS.values():
        if (arch.embed_dim, arch.depth, arch.patch_size) == (embed_dim, depth, patch):
            return arch.name
    return f"no known arch (embed_dim {embed_dim}, {depth} blocks, patch {patch})"


def _fit_position_embedding(
    model: Segmenter, state: dict[str, Tensor], metadata: dict[str, Any], path: Path
) -> dict[str, str]:
    """Drop the cls row of state's position embedding and resize the rest to the model's grid; says so if it did."""
    embedding, grid = state[POS_EMBED], model.backbone.grid
    if embedding.ndim != 3 or embedding.shape[2] != model.arch.embed_dim:
        raise ModelError(f"{path}: {POS_EMBED} of shape {tuple(embedding.shape)} is no position embedding")
    if CLS_TOKEN in state:
        embedding = embedding[:, 1:]
    tokens = embedding.shape[1]
    try:
        if "image_size" in metadata:
            old = tuple(side // model.arch.patch_size for side in metadata["image_size"])
            if old[0] * old[1] != tokens:
                raise ModelError(f"{tokens} position embeddings do not fit image_size {metadata['image_size']}")
        else:
            is_pretraining = not any(key.startswith("decode_head.") for key in state)
            old = infer_grid(tokens, grid, prefer_square=is_pretraining)
    except ModelError as error:
        raise ModelError(f"{path}: {POS_EMBED}: {error}, use a file for another image size") from None
    if old == grid:
        state[POS_EMBED] = embedding
        return {}
    state[POS_EMBED] = resize_position_embedding(embedding, old, grid)
    return {POS_EMBED: f"{old[0]}x{old[1]} -> {grid[0]}x{grid[1]}"}


def _fit_head(model: Segmenter, state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, str]:
    """Draw anew what the file can't give the head; says which keys, and why."""
    head = [key for key in own if key.startswith("decode_head.")]
    if not any(key in state for key in head):
        model.decode_head.reset_parameters()
        return dict.fromkeys(head, "not in the file")
    for key in head:
        if key not in state:
            raise ModelError(f"{path}: holds only a part of the head, {key} is missing: is the arch the right one?")
    classifier = [key for key in head if key.startswith("decode_head.conv_seg.")]
    for key in head:
        # The number of classes is the first dimension of conv_seg's tensors: that, and only that, may differ.
        skip = 1 if key in classifier else 0
        if state[key].shape[skip:] != own[key].shape[skip:]:
            raise ModelError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}: "
                "is the arch the right one?"
            )
    classes = {state[key].shape[0] for key in classifier}
    if classes == {model.num_classes}:
        return {}
    model.decode_head.reset_classifier()
    return dict.fromkeys(classifier, f"{max(classes)} classes in the file, {model.num_classes} in the model")


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """The model that one of our own .safetensors files describes and holds, fp32, on the CPU, in eval mode; and the
    file's metadata. Raises ModelError if the metadata can't build the model or the tensors aren't the model's.
    """
    metadata = read_metadata(path)
    absent = [key for key in ("arch", "num_classes", "image_size", "patch_padding") if key not in metadata]
    if absent:
        raise ModelError(f"{path}: its metadata lacks {', '.join(absent)}, give a .safetensors that training wrote")
    height, width = metadata["image_size"]
    try:
        with torch.device("meta"):
            model = build_segmenter(
                metadata["arch"], metadata["num_classes"], (height, width), metadata["patch_padding"]
            )
    except ModelError as error:
        raise ModelError(f"{path}: metadata: {error}") from None
    state, own = read_weights(path), model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ModelError(f"{path}: {len(wrong)} tensors are not those its metadata promises ({', '.join(wrong[:3])})")
    model.load_state_dict(state, assign=True)
    return model.float().eval(), metadata
