"""What the tests of model/ share: the golden data of the original Sapiens and Sapiens2, and small models."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelError
from model.archs import Arch
from model.segmenter import Segmenter, build_segmenter
from model.weights import load_weights

FIXTURES = Path(__file__).parent / "fixtures"
ARCH = Arch("golden", "sapiens", 64, 4, 4, 16, head_deconv=(32, 32, 32), head_conv=(32, 32, 32))
ARCH2 = Arch("golden2", "sapiens2", 64, 20, 4, 16, (32, 32, 16, 16), (16, 16), "vit_base_patch16_sapiens2")
MICRO = Arch("micro", "sapiens2", 32, 18, 4, 16, (16,), (16,), "vit_base_patch16_sapiens2", 2.0)
SIZE = (128, 96)
PADDING = {"pad2": 2, "nopad": 0}
METADATA = {"arch": "tiny", "image_size": list(SIZE), "patch_padding": 2, "num_classes": 5, "step": 7}
EXPECTED = json.loads((FIXTURES / "golden_v1" / "expected.json").read_text())
EXPECTED2 = json.loads((FIXTURES / "golden_v2" / "expected.json").read_text())


@cache
def arrays(name: str, version: int = 1) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"golden_v{version}" / f"{name}.npz") as file:
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


def write_segmentation2(path: Path) -> Path:
    """Sapiens2's layout of a fine-tuned model, with the RoPE's periods in bf16."""
    state = {key: value for part in range(1, 8) for key, value in arrays(f"segmentation_{part}", 2).items()}
    periods = arrays("tensors", 2)["bf16/periods"].bfloat16()
    save_file(state | {"backbone.rope_embed.periods": periods}, path, {"format": "pt"})
    return path


def build_golden(num_classes: int = 19, image_size: tuple[int, int] = SIZE, patch_padding: int = 2) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ARCH, num_classes, image_size, patch_padding).eval()


def build_golden2(path: Path, rope_precision: str = "bf16", num_classes: int = 29, arch: Arch = ARCH2) -> Segmenter:
    """The small Sapiens2 with the weights at `path`."""
    torch.manual_seed(0)
    model = Segmenter(arch, num_classes, SIZE, rope_precision=rope_precision).eval()
    load_weights(model, path)
    return model


def build_tiny(seed: int = 0, image_size: tuple[int, int] = SIZE) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter("tiny", 5, image_size).eval()


def images(batch: int, size: Sequence[int] = (32, 24)) -> Tensor:
    """Noise: uint8 (batch, 3, *size), the same for each batch."""
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


def refused(action: Callable, *arguments: object, match: str) -> str:
    """The message of the ModelError, which must be one line."""
    with pytest.raises(ModelError, match=match) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
