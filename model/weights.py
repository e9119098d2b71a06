"""Weights into a model, with a report of what became of every key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelError
from model.archs import ARCHS, Arch
from model.backbone import infer_grid, resize_position_embedding
from model.segmenter import Segmenter
from model.weight_files import locate_weights, read_metadata, read_weights

POS_EMBED = "backbone.pos_embed"
CLS_TOKEN = "backbone.cls_token"
PERIODS = "backbone.rope.periods"
CLASSIFIER = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a weight file and of the model it was loaded into; keys are the model's names.

    Each of the model's keys is in one of loaded, resized (values of the file's, made to fit) and reinitialised; the last
    two map it to what happened. The unused are the file's own surplus.
    """

    path: Path
    loaded: tuple[str, ...]
    resized: dict[str, str]
    reinitialised: dict[str, str]
    unused: tuple[str, ...]
    licence: str  # what the file says, else that of the family's released weights

    def summary(self) -> str:
        """A table: each category's count, then one line for each key that wasn't simply loaded."""
        lines = [f"weights from {self.path}"]
        for name in ("loaded", "resized", "reinitialised", "unused"):
            keys = getattr(self, name)
            lines.append(f"  {name:<14}{len(keys):>5}")
            if name in ("resized", "reinitialised"):
                lines += [f"    {key}: {what}" for key, what in keys.items()]
            elif name == "unused":
                lines += [f"    {key}" for key in keys]
        return "\n".join(lines)


def load_weights(
    model: Segmenter, path: str | Path, classes: Sequence[str] = (), partial: bool = False, match_classes: bool = True
) -> LoadReport:
    """Fill `model`, in place, from a file of any kind that read_weights knows, or from the hub (see locate_weights).

    The arguments are those of `match_weights`, which raises the same.
    """
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), "load_weights needs a model with real tensors"
    state, report = match_weights(model, path, classes, partial, match_classes)
    model.load_state_dict(state, strict=False)
    return report


def match_weights(
    model: Segmenter, path: str | Path, classes: Sequence[str] = (), partial: bool = False, match_classes: bool = True
) -> tuple[dict[str, Tensor], LoadReport]:
    """What `model` takes from a file, and what becomes of all keys. A model on the meta device will do: then it costs nothing.

    Args:
        classes: the names of the model's classes. Where the file tells its own, and they are others or in another order,
            the classifier's rows go by name.
        partial: draw anew what the file lacks of the backbone, or has in another shape. Else that is an error.
        match_classes: False draws the classifier anew instead of taking rows by name.

    The position embedding is resized to the model's grid. The classifier is drawn anew if the file has another number of
    classes and doesn't name them, and the whole head if the file has none. Raises ModelError if the file doesn't cover the
    whole backbone, belongs to another architecture, or has a head of another shape.
    """
    path = locate_weights(path)
    state, metadata = read_weights(path), read_metadata(path)
    own = model.state_dict()
    periods = check_periods(model, state, path)
    reinitialised = _check_backbone(model, state, own, path, partial)
    for key in ("patch_padding", "rope_precision"):
        if metadata.get(key, getattr(model, key)) != getattr(model, key):
            raise ModelError(
                f"{path}: was trained with {key} {metadata[key]}, set it so for the model too, which has {getattr(model, key)}"
            )
    resized = {} if POS_EMBED in reinitialised else _fit_position_embedding(model, state, metadata, path)
    reinitialised |= _fit_head(model, state, own, path)
    if not any(key in reinitialised for key in CLASSIFIER):
        kept, drawn = _fit_classes(model, state, _class_names(metadata), tuple(classes), match_classes)
        resized, reinitialised = resized | kept, reinitialised | drawn
    loaded = {key: value for key, value in state.items() if key in own and key not in reinitialised}
    return loaded, LoadReport(
        path=path,
        loaded=(*(key for key in loaded if key not in resized), *periods),
        resized=resized,
        reinitialised=reinitialised,
        unused=tuple(key for key in state if key not in own),
        licence=_licence(metadata, model.arch),
    )


def _licence(metadata: dict[str, Any], arch: Arch) -> str:
    origin = metadata.get("origin")
    return str(origin.get("licence", "")) if isinstance(origin, dict) else arch.licence


def check_periods(model: Segmenter, state: dict[str, Tensor], path: Path) -> tuple[str, ...]:
    """Take the RoPE's periods out of state: they are constants, which the model has by itself, rounded to bf16 in files."""
    periods = state.pop(PERIODS, None)
    if periods is None:
        return ()
    own = getattr(getattr(model.backbone, "rope", None), "periods", None)
    if own is None or own.shape != periods.shape or not (own.is_meta or torch.equal(own.bfloat16(), periods.bfloat16())):
        raise ModelError(f"{path}: {PERIODS}: not those of {model.arch.name}: is the arch the right one?")
    return (PERIODS,)


def _check_backbone(
    model: Segmenter, state: dict[str, Tensor], own: dict[str, Tensor], path: Path, partial: bool
) -> dict[str, str]:
    """The backbone's keys that stay as they were drawn, and why. Raises ModelError if there are any and not `partial`."""
    wrong = {}
    for key in own:
        if key.startswith("backbone.") and key not in state:
            wrong[key] = "not in the file"
        elif key.startswith("backbone.") and key != POS_EMBED and state[key].shape != own[key].shape:
            wrong[key] = f"{tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
    # A deeper model's file would cover a shallower one, with its last layers cut off.
    surplus = [key for key in state if key.startswith("backbone.blocks.") and key not in own]
    covers_any = any(key.startswith("backbone.") and key not in wrong for key in own)
    if (wrong or surplus) and not (partial and covers_any):
        keys = [*wrong, *surplus]
        raise ModelError(
            f"{path}: does not fit the backbone of {model.arch.name}, {len(keys)} keys are missing, surplus or of "
            f"another shape ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}); it looks like "
            f"{_describe_arch(state)}: is the arch the right one?"
        )
    return wrong


def find_arch(state: dict[str, Tensor]) -> Arch | None:
    """The row of the table with this backbone's shapes."""
    patches = state.get("backbone.patch_embed.proj.weight")
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.blocks.")})
    family = "sapiens2" if "backbone.blocks.0.attn.q_proj.weight" in state else "sapiens"
    for arch in ARCHS.values():
        shape = (arch.embed_dim, 3, arch.patch_size, arch.patch_size)
        if patches is not None and patches.shape == shape and (arch.family, arch.depth) == (family, depth):
            return arch
    return None


def _describe_arch(state: dict[str, Tensor]) -> str:
    arch = find_arch(state)
    if arch:
        return arch.name
    patches = state.get("backbone.patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return f"no vision transformer (first keys: {', '.join(list(state)[:3])})"
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.blocks.")})
    return f"no known arch (embed_dim {patches.shape[0]}, {depth} blocks, patch {patches.shape[-1]})"


def _fit_position_embedding(model: Segmenter, state: dict[str, Tensor], metadata: dict[str, Any], path: Path) -> dict[str, str]:
    """Bring state's position embedding, if there is one, to the model's grid and prefix tokens; says so if it did."""
    if POS_EMBED not in state or getattr(model.backbone, "pos_embed", None) is None:
        return {}
    embedding, grid = state[POS_EMBED], model.grid
    if embedding.ndim != 3 or embedding.shape[2] != model.arch.embed_dim:
        raise ModelError(f"{path}: {POS_EMBED} of shape {tuple(embedding.shape)} is no position embedding")
    prefix = model.backbone.pos_embed.shape[1] - grid[0] * grid[1]  # rows of the class token, in some of timm's
    first, embedding = embedding[:, :prefix], embedding[:, prefix:]
    if CLS_TOKEN in state and model.backbone.cls_token is None:
        embedding = embedding[:, 1:]
    tokens = embedding.shape[1]
    if tokens == 0:
        raise ModelError(f"{path}: {POS_EMBED} has no rows, copy the file again")
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
        state[POS_EMBED] = torch.cat([first, embedding], dim=1)
        return {}
    state[POS_EMBED] = torch.cat([first.float(), resize_position_embedding(embedding, old, grid)], dim=1)
    return {POS_EMBED: f"{old[0]}x{old[1]} -> {grid[0]}x{grid[1]}"}


def _fit_head(model: Segmenter, state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, str]:
    """Draw the whole head anew if the file has none; says which keys. Raises ModelError for a part of one."""
    head = [key for key in own if key.startswith("decode_head.")]
    if not any(key in state for key in head):
        model.decode_head.reset_parameters()
        return dict.fromkeys(head, "not in the file")
    for key in head:
        if key not in state:
            raise ModelError(f"{path}: holds only a part of the head, {key} is missing: is the arch the right one?")
        # The number of classes is the first dimension of conv_seg's tensors: that, and only that, may differ.
        skip = 1 if key in CLASSIFIER else 0
        if state[key].ndim != own[key].ndim or state[key].shape[skip:] != own[key].shape[skip:]:
            raise ModelError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}: "
                "is the arch the right one?"
            )
    return {}


def _class_names(metadata: dict[str, Any]) -> tuple[str, ...]:
    return tuple(entry["name"] for entry in metadata.get("label_set", {}).get("classes", ()))


def _fit_classes(
    model: Segmenter, state: dict[str, Tensor], theirs: tuple[str, ...], ours: tuple[str, ...], match: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Bring state's classifier to the model's classes: (what happened to keys that keep something, to those drawn anew)."""
    there = {state[key].shape[0] for key in CLASSIFIER}
    plain = [_plain(name) for name in theirs], [_plain(name) for name in ours]
    if all(len(set(names)) == len(names) for names in plain):  # else "T-shirt" and "T shirt" are two classes
        theirs, ours = plain
    else:
        theirs, ours = list(theirs), list(ours)
    named = there == {len(theirs)} and len(ours) == model.num_classes
    if there == {model.num_classes} and (not named or theirs == ours):
        return {}, {}
    rows = {i: theirs.index(name) for i, name in enumerate(ours) if name in theirs} if named and match else {}
    model.decode_head.reset_classifier()
    if not rows:
        why = "other classes" if named else f"{max(there)} classes in the file, {model.num_classes} in the model"
        return {}, dict.fromkeys(CLASSIFIER, why)
    for key, parameter in zip(CLASSIFIER, (model.decode_head.conv_seg.weight, model.decode_head.conv_seg.bias), strict=True):
        carried = parameter.detach().clone()
        carried[list(rows)] = state[key][list(rows.values())].to(carried)
        state[key] = carried
    what = f"{len(rows)} of {len(ours)} classes taken by name from the file's {len(theirs)}, the others drawn anew"
    return dict.fromkeys(CLASSIFIER, what), {}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.casefold())
