"""The vision transformer: timm's, with Sapiens' patch padding and a feature map for an output."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model import ModelError
from model.archs import Arch


class Backbone(VisionTransformer):
    """Pixels (B, 3, H, W), normalised -> features (B, embed_dim, H/p, W/p), after the final norm.

    patch_padding is the zero padding, in pixels, of the patch convolution. It moves the grid and leaves its size:
    2 is what Sapiens was pre-trained with, 0 what its face and Goliath models were fine-tuned with.
    `set_grad_checkpointing` (timm's) makes the backward pass recompute every block instead of keeping it.

    Raises ModelError if the image isn't whole patches, or the padding would add to the grid.
    """

    def __init__(self, arch: Arch, image_size: tuple[int, int], patch_padding: int = 2) -> None:
        arch.check(image_size, patch_padding)
        patch = arch.patch_size
        super().__init__(
            img_size=image_size,
            patch_size=patch,
            num_classes=0,
            global_pool="",
            embed_dim=arch.embed_dim,
            depth=arch.depth,
            num_heads=arch.num_heads,
            mlp_ratio=4.0,
            qkv_bias=True,
            class_token=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.patch_embed.proj = nn.Conv2d(3, arch.embed_dim, patch, stride=patch, padding=patch_padding)
        with torch.no_grad():  # as MAE starts: a short training from scratch need not learn the grid first
            self.pos_embed.copy_(build_sincos2d_pos_embed(self.grid, arch.embed_dim, device=self.pos_embed.device)[None])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.forward_features(pixels)
        return tokens.transpose(1, 2).unflatten(2, self.grid)


def resize_position_embedding(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, old rows * columns, E) -> (1, new rows * columns, E) fp32, bicubically and without antialiasing."""
    assert embedding.shape[1] == math.prod(old), f"{embedding.shape[1]} embeddings are not a grid of {old}"
    plane = embedding.float().transpose(1, 2).unflatten(2, old)
    plane = F.interpolate(plane, size=new, mode="bicubic", align_corners=False, antialias=False)
    return plane.flatten(2).transpose(1, 2)


def infer_grid(tokens: int, own: tuple[int, int], prefer_square: bool) -> tuple[int, int]:
    """The (rows, columns) that `tokens` position embeddings most likely came from.

    A square where `prefer_square` says so, then the model's `own` grid, then a square, then the factors whose aspect
    is nearest the model's own. Raises ModelError where even those are more than twice as wide or as high.
    """
    side = math.isqrt(tokens)
    is_square = side * side == tokens
    if is_square and prefer_square:
        return side, side
    if tokens == math.prod(own):
        return own
    if is_square:
        return side, side

    def stretch(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[0] / grid[1] / (own[0] / own[1])))

    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    best = min(grids, key=stretch, default=None)
    if best is None or stretch(best) > math.log(2):
        raise ModelError(f"{tokens} position embeddings form no grid near the model's {own[0]}x{own[1]}")
    return best
