"""Images to class logits, and what the optimiser has to know about each parameter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelError
from model.archs import Arch, get_arch
from model.backbone import ROPE_PRECISIONS, build_backbone, draw_drop_path
from model.head import DeconvHead

MEAN = (123.675, 116.28, 103.53)  # RGB, of pixels in 0..255
STD = (58.395, 57.12, 57.375)
EMBEDDINGS = ("pos_embed", "cls_token", "reg_token")  # what the blocks' tokens begin as


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB, 0..255, uint8 or float -> float32, each channel less its mean over its deviation.

    The constants stay Python numbers: a buffer would be rounded by .bfloat16(), and a tensor cached for each device
    would leak out of torch.export's tracing.
    """
    channels = zip(images.float().unbind(1), MEAN, STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


class Segmenter(nn.Module):
    """A backbone and a head.

    image_size is (height, width) in pixels, the size it is made for; other images have their positions resized.
    patch_padding is the zero padding of the patch convolution, in pixels; None takes what the family was pre-trained with.
    rope_precision is for Sapiens2 alone: "bf16" computes its RoPE, and rounds queries and keys, as the original does by
    default and was trained; "fp32" computes it exactly. Features differ by up to a few hundredths between the two.
    dropout is the rate of the head's channels; drop_path the last block's rate of stochastic depth.

    Raises ModelError if the image size, the padding or the number of classes can't be had with this architecture.
    """

    def __init__(
        self,
        arch: Arch,
        num_classes: int,
        image_size: tuple[int, int],
        patch_padding: int | None = None,
        rope_precision: str = "bf16",
        dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ModelError(f"num_classes: {num_classes} leaves nothing to tell apart, give at least 2")
        if rope_precision not in ROPE_PRECISIONS:
            raise ModelError(f"rope_precision: {rope_precision!r} must be one of {', '.join(ROPE_PRECISIONS)}")
        self.arch = arch
        self.num_classes = num_classes
        self.image_size = image_size
        self.patch_padding = arch.padding(patch_padding)
        self.rope_precision = rope_precision if arch.family == "sapiens2" else "fp32"
        self.backbone = build_backbone(arch, image_size, self.patch_padding, rope_precision, drop_path)
        self.decode_head = DeconvHead(arch, num_classes, dropout)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of image_size."""
        return self.image_size[0] // self.arch.patch_size, self.image_size[1] // self.arch.patch_size

    def describe(self) -> dict[str, Any]:
        """What a weight file must tell for the model to be built again, and pixels to be normalised for it."""
        return {
            "arch": self.arch.name,
            "image_size": list(self.image_size),
            "patch_padding": self.patch_padding,
            "rope_precision": self.rope_precision,
            "num_classes": self.num_classes,
            "normalization": {"channels": "RGB", "range": [0, 255], "mean": list(MEAN), "std": list(STD)},
        }

    def forward(self, images: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Logits at the head's resolution, in the parameters' dtype: see full_size_logits for the image's own.

        images: (B, 3, H, W) RGB, 0..255, uint8 or float; H and W are filled up to whole patches, at the bottom and the
        right, with the mean colour. dropout_seeds: int64 (B,) on the CPU, needed for training.
        Returns (B, num_classes, h, w): the filled-up image at the resolution of the head, a half for Sapiens v1.
        """
        # A bias, not a weight: it keeps its dtype when DeepSpeed ZeRO-3 has partitioned it away.
        pixels = normalize(images).to(self.decode_head.conv_seg.bias.dtype)
        down, right = (-side % self.arch.patch_size for side in images.shape[-2:])
        if down or right:
            pixels = F.pad(pixels, (0, right, 0, down))
        if self.training:
            draw_drop_path(self.backbone, dropout_seeds)
        return self.decode_head(self.backbone(pixels), dropout_seeds)


def full_size_logits(model: Segmenter, images: Tensor) -> Tensor:
    """fp32 logits (B, num_classes, H, W) for images (B, 3, H, W) of any size, enlarged bilinearly."""
    height, width = images.shape[-2:]
    filled = (height + -height % model.arch.patch_size, width + -width % model.arch.patch_size)
    logits = F.interpolate(model(images).float(), filled, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def build_segmenter(arch: str, *args: object, **settings: object) -> Segmenter:
    """A Segmenter of the architecture called `arch`, with fresh weights, on the default device (`with
    torch.device("meta")` costs nothing). The other arguments are Segmenter's. Raises ModelError as it does, and for an
    unknown architecture.
    """
    return Segmenter(get_arch(arch), *args, **settings)


def layer_id(parameter_name: str, depth: int) -> int:
    """How deep a parameter sits, for layer-wise learning rates: 0 for the embeddings, i + 1 for block i, depth + 1
    for the final norm and the head. Raises ModelError for a name that a Segmenter of this depth doesn't have.
    """
    part, _, rest = parameter_name.partition(".")
    if part == "decode_head" or parameter_name.startswith("backbone.norm."):
        return depth + 1
    rest = rest if part == "backbone" else ""
    if rest in EMBEDDINGS or rest.startswith(("patch_embed.", "norm_pre.", "rope.")):
        return 0
    if rest.startswith("blocks."):
        block = rest.split(".")[1]
        if block.isdigit() and int(block) < depth:
            return int(block) + 1
    raise ModelError(f"parameter {parameter_name!r} belongs to no layer of a Segmenter of depth {depth}")


def has_weight_decay(name: str, parameter_ndim: int) -> bool:
    """False for vectors (norms and biases) and the position embedding.

    Ask before DeepSpeed ZeRO-3 partitions the model: afterwards every parameter has one dimension.
    """
    return parameter_ndim > 1 and not name.endswith((".bias", "pos_embed"))
