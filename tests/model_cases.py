"""What the tests of model/ share: the golden data of the original Sapiens v1 and small models."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model import ModelError
from model.archs import Arch
from model.segmenter import Segmenter, build_segmenter

FOLDER = Path(__file__).parent / "fixtures" / "golden_v1"
ARCH = Arch("golden", embed_dim=64, depth=4, num_heads=4, head_deconv=(32, 32, 32), head_conv=(32, 32, 32))
SIZE = (128, 96)
PADDING = {"pad2": 2, "nopad": 0}
METADATA = {"arch": "tiny", "image_size": list(SIZE), "patch_padding": 2, "num_classes": 5, "step": 7}
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def write_segmentation(path: Path) -> Path:
    """The original's layout of a fine-tuned model."""
    state = arrays("segmentation_1") | arrays("segmentation_2")
    torch.save({"state_dict": state, "meta": {"epoch": 1, "dataset_meta": {"classes": ["background"]}}}, path)
    return path


def write_pretraining(path: Path, name: str, **changed: Tensor | None) -> Path:
    """The original's layout of a pre-trained backbone, with some tensors replaced or, if None, left out."""
    state = arrays(f"pretrain_{name}") | changed
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


def build_golden(num_classes: int = 19, image_size: tuple[int, int] = SIZE, patch_padding: int = 2) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ARCH, num_classes, image_size, patch_padding).eval()


def build_tiny(seed: int = 0, image_size: tuple[int, int] = SIZE) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter("tiny", 5, image_size).eval()


def refused(action: Callable, *arguments: object, match: str) -> str:
    """The message of the ModelError, which must be one line."""
    with pytest.raises(ModelError, match=match) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
