"""A trained model out of one file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelError
from model.segmenter import Segmenter, build_segmenter
from model.weight_files import locate_weights, read_metadata, read_weights
from model.weights import CLASSIFIER, POS_EMBED, check_periods, find_arch


def load_segmenter(path: str | Path, **told: Any) -> tuple[Segmenter, dict[str, Any]]:
    """The model that one file describes and holds, fp32, on the CPU, in eval mode; and its metadata, complete.

    Our own files tell everything. Of an original's segmentation file the arch is told by its shapes; `told` can add what
    it doesn't tell: patch_padding (0 for face and Goliath, 2 for LIP and CIHP), image_size (else 1024x768), label_set.
    Raises ModelError if the two can't build the model, contradict each other, or the tensors aren't the model's.
    """
    path = locate_weights(path)
    state, metadata = read_weights(path), read_metadata(path)
    for key, value in told.items():
        if key != "label_set" and metadata.get(key, value) != value:
            raise ModelError(f"{path}: says {key} {metadata[key]}, not {value}; leave that out")
    metadata = _inferred(state, path) | metadata | told
    absent = [key for key in ("arch", "num_classes", "image_size", "patch_padding") if key not in metadata]
    if absent:
        raise ModelError(
            f"{path}: does not tell its {', '.join(absent)}; convert it once with python -m model.export, which takes them "
            "(patch padding: 0 for face and Goliath, 2 for LIP and CIHP)"
        )
    try:
        with torch.device("meta"):
            model = build_segmenter(
                metadata["arch"], metadata["num_classes"], tuple(metadata["image_size"]), metadata["patch_padding"],
                metadata["rope_precision"],
            )  # fmt: skip
    except ModelError as error:
        raise ModelError(f"{path}: metadata: {error}") from None
    _compute_constants(model)
    check_periods(model, state, path)
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ModelError(f"{path}: {len(wrong)} tensors are not those its metadata promises ({', '.join(wrong[:3])})")
    model.load_state_dict(state, assign=True)
    return model.float().eval(), metadata


def _inferred(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """What the shapes of a segmentation file's tensors tell of the model."""
    if not all(key in state and state[key].ndim > 0 for key in CLASSIFIER):
        raise ModelError(f"{path}: holds no classifier ({CLASSIFIER[0]}), only a trained segmentation model will do")
    arch = find_arch(state)
    inferred: dict[str, Any] = {"num_classes": state[CLASSIFIER[0]].shape[0], "rope_precision": "bf16"}
    if arch is None:
        return inferred
    inferred["arch"] = arch.name
    if POS_EMBED not in state or state[POS_EMBED].shape[1] == 1024 // arch.patch_size * (768 // arch.patch_size):
        inferred["image_size"] = [1024, 768]
    return inferred | ({} if arch.family == "sapiens" else {"patch_padding": 0})


def _compute_constants(model: torch.nn.Module) -> None:
    """Give the buffers that no file holds, RoPE's, their values in a model that was built on the meta device."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.init_non_persistent_buffers()
