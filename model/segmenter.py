"""Images to class logits, and what the optimiser has to know about each parameter."""

import torch
from torch import Tensor, nn

from model import ModelError
from model.archs import Arch, get_arch
from model.backbone import Backbone
from model.head import DeconvHead

MEAN = (123.675, 116.28, 103.53)  # RGB, of pixels in 0..255
STD = (58.395, 57.12, 57.375)


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W) RGB, 0..255, uint8 or float -> float32, each channel less its mean over its deviation.

    The constants stay Python numbers: a buffer would be rounded by .bfloat16(), and a tensor cached for each device
    would leak out of torch.export's tracing.
    """
    channels = zip(images.float().unbind(1), MEAN, STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


class Segmenter(nn.Module):
    """A backbone and a head. image_size is (height, width) in pixels, fixed by the position embedding.

    Raises ModelError if the image size, the padding or the number of classes can't be had with this architecture.
    """

    def __init__(
        self,
        arch: Arch,
        num_classes: int,
        image_size: tuple[int, int],
        patch_padding: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ModelError(f"num_classes: {num_classes} leaves nothing to tell apart, give at least 2")
        self.arch = arch
        self.num_classes = num_classes
        self.image_size = image_size
        self.patch_padding = patch_padding
        self.backbone = Backbone(arch, image_size, patch_padding)
        self.decode_head = DeconvHead(arch, num_classes, dropout)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' and the head's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)
        self.decode_head.set_grad_checkpointing(enable)

    def forward(self, images: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Logits at the head's resolution, half the image's for patch 16, in the parameters' dtype.

        images: (B, 3, H, W) RGB, 0..255, uint8 or float. dropout_seeds: int64 (B,) on the CPU, needed for training.
        Returns (B, num_classes, 8H/patch, 8W/patch).
        """
        # A bias, not the weight: it keeps its dtype when DeepSpeed ZeRO-3 has partitioned it away.
        pixels = normalize(images).to(self.backbone.patch_embed.proj.bias.dtype)
        return self.decode_head(self.backbone(pixels), dropout_seeds)


def build_segmenter(
    arch: str, num_classes: int, image_size: tuple[int, int], patch_padding: int = 2, dropout: float = 0.1
) -> Segmenter:
    """A Segmenter with fresh weights, on the default device (`with torch.device("meta")` costs nothing).

    Raises ModelError for an unknown architecture or an image size that isn't whole patches.
    """
    return Segmenter(get_arch(arch), num_classes, image_size, patch_padding, dropout)


def layer_id(parameter_name: str, depth: int) -> int:
    """How deep a parameter sits, for layer-wise learning rates: 0 for the embeddings, i + 1 for block i, depth + 1
    for the final norm and the head. Raises ModelError for a name that a Segmenter of this depth doesn't have.
    """
    part, _, rest = parameter_name.partition(".")
    if part == "decode_head" or parameter_name.startswith("backbone.norm."):
        return depth + 1
    if parameter_name == "backbone.pos_embed" or parameter_name.startswith("backbone.patch_embed."):
        return 0
    if part == "backbone" and rest.startswith("blocks."):
        block = rest.split(".")[1]
        if block.isdigit() and int(block) < depth:
            return int(block) + 1
    raise ModelError(f"parameter {parameter_name!r} belongs to no layer of a Segmenter of depth {depth}")


def has_weight_decay(name: str, parameter_ndim: int) -> bool:
    """False for vectors (norms and biases) and the position embedding.

    Ask before DeepSpeed ZeRO-3 partitions the model: afterwards every parameter has one dimension.
    """
    return parameter_ndim > 1 and not name.endswith((".bias", "pos_embed"))
