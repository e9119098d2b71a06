"""The vision transformer: timm's, with Sapiens' patch padding, position embedding and RoPE, and a feature map for output."""

import math
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, DropPath, RotaryEmbeddingDinoV3, apply_rot_embed_cat, build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model import ModelError
from model.archs import FEATURES, Arch

ROPE_PRECISIONS = ("bf16", "fp32")


class FeatureMap:
    """Makes a vision transformer of timm's a map: normalised pixels (B, 3, H, W), whole patches -> features
    (B, embed_dim, H/p, W/p), after the final norm.

    A method of its own class, not a wrapper around it: DeepSpeed ZeRO-3 gathers the position embedding and the class
    token when the module that owns them is called.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[0]


class SapiensViT(FeatureMap, VisionTransformer):
    """Sapiens v1. patch_padding is the zero padding, in pixels, of the patch convolution. It moves the grid and leaves its
    size: 2 is what Sapiens was pre-trained with, 0 what its face and Goliath models were fine-tuned with.
    """

    def __init__(self, arch: Arch, image_size: tuple[int, int], patch_padding: int, drop_path: float) -> None:
        patch = arch.patch_size
        super().__init__(
            img_size=image_size,
            patch_size=patch,
            num_classes=0,
            global_pool="",
            embed_dim=arch.embed_dim,
            depth=arch.depth,
            num_heads=arch.num_heads,
            mlp_ratio=arch.mlp_ratio,
            qkv_bias=True,
            class_token=False,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.patch_embed.proj = nn.Conv2d(3, arch.embed_dim, patch, stride=patch, padding=patch_padding)
        with torch.no_grad():  # as MAE starts: a short training from scratch need not learn the grid first
            grid = self.patch_embed.grid_size
            self.pos_embed.copy_(build_sincos2d_pos_embed(grid, arch.embed_dim, device=self.pos_embed.device)[None])

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, rows, columns, E) -> (B, rows * columns, E). Resized as the original does it: timm would antialias."""
        own, grid = self.patch_embed.grid_size, tuple(x.shape[1:3])
        embedding = self.pos_embed if grid == own else resize_position_embedding(self.pos_embed, own, grid).to(x.dtype)
        return x.flatten(1, 2) + embedding


class Bf16Rope(RotaryEmbeddingDinoV3):
    """Sines and cosines computed in bf16 from start to end, as the original Sapiens2 does, which was trained so."""

    def _create_embed(self, feat_shape: tuple[int, int], no_aug: bool = False) -> Tensor:
        like = {"dtype": torch.bfloat16, "device": self.periods.device}
        sides = [torch.arange(0.5, side, **like) / side for side in feat_shape]
        coords = 2.0 * torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1) - 1.0
        angles = (2 * math.pi * coords[:, :, None] / self.periods.bfloat16()).flatten(1).tile(2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class GroupedAttention(AttentionRope):
    """Sapiens2's, of its middle blocks, where two heads of queries share one of keys and values. timm's repeats those for the
    second head, and keeps them so for the backward pass; here the kernels do without. The output is the same to the bit,
    gradients but for rounding.
    """

    def forward(self, x: Tensor, rope: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, E), rope (N less the prefix tokens, 2 * head_dim): sines and cosines -> (B, N, E)."""
        assert attn_mask is None and not is_causal, "every token sees all others"
        q, k, v = (proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._turned(self.q_norm(q), rope).type_as(v), self._turned(self.k_norm(k), rope).type_as(v)
        # Flash attention alone takes groups on CUDA; without it all N x N weights would be held.
        repeats = x.is_cuda and (v.dtype == torch.float32 or torch.cuda.get_device_properties(x.device).major < 8)
        if repeats:
            k, v = (tensor.repeat_interleave(self.num_kv_groups, dim=1) for tensor in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeats)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, heads, N, head_dim), all but the prefix tokens turned by their places."""
        prefix, patches = x.split([self.num_prefix_tokens, x.shape[2] - self.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2)


def build_backbone(
    arch: Arch, image_size: tuple[int, int], patch_padding: int, rope_precision: str, drop_path: float
) -> nn.Module:
    """A timm vision transformer that is a FeatureMap, for images of (height, width) or, resizing its positions, any other.

    rope_precision: see Segmenter. drop_path is the last block's rate of stochastic depth; it grows linearly from 0.

    Raises ModelError if the image isn't whole patches, or the padding isn't the family's.
    """
    arch.check(image_size, patch_padding)
    if arch.family == "sapiens":
        return _seeded(SapiensViT(arch, image_size, patch_padding, drop_path))
    options = {} if arch.family == "timm" else _sapiens2_options(arch)
    model = timm.create_model(arch.timm_name, img_size=image_size, drop_path_rate=drop_path, **FEATURES, **options)
    model.__class__ = type(type(model).__name__, (FeatureMap, type(model)), {})
    _hold_still(model)
    if arch.family == "sapiens2":
        for block in model.blocks:
            if block.attn.num_kv_groups > 1:
                block.attn.__class__ = GroupedAttention
    if arch.family == "sapiens2" and rope_precision == "bf16":
        model.rope = Bf16Rope(arch.embed_dim // arch.num_heads, temperature=100.0)
        for block in model.blocks:  # the original rounds queries and keys, the class token's too, before it turns them
            block.attn.q_norm.register_forward_hook(_round_to_bf16)
            block.attn.k_norm.register_forward_hook(_round_to_bf16)
    return _seeded(model)


def _sapiens2_options(arch: Arch) -> dict:
    half = arch.num_heads // 2
    return {
        "patch_size": arch.patch_size,
        "embed_dim": arch.embed_dim,
        "depth": arch.depth,
        "num_heads": arch.num_heads,
        "mlp_ratio": arch.mlp_ratio,
        "num_kv_heads": tuple(half if 8 <= i < arch.depth - 8 else arch.num_heads for i in range(arch.depth)),
    }


def _round_to_bf16(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.bfloat16()


def _hold_still(model: nn.Module) -> None:
    """timm's RoPE moves its grid in training, by numbers of the device's running state. Sapiens2's published code does not, and a
    run would be another one after a restart. Its creation takes no None for that."""
    for module in model.modules():
        if hasattr(module, "rescale_coords"):
            module.shift_coords = module.jitter_coords = module.rescale_coords = None
            module.aug_active = False  # else it is made anew in each forward pass


class SampleDropPath(nn.Module):
    """Stochastic depth that leaves a block's branch out for sample i where `keep[i]` is 0.

    timm's draws from the device's running state, which changes with the rank, the micro batch and a restart.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None  # (B,), 0 or 1 / (1 - rate): drawn by draw_drop_path before each forward pass

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E)."""
        if not self.training:
            return x
        assert self.keep is not None, "draw_drop_path comes before a forward pass in training"
        return x * self.keep[:, None, None].to(x, non_blocking=True)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def _seeded(model: nn.Module) -> nn.Module:
    """`model` with each of timm's DropPath replaced by one that depends on the sample alone."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, SampleDropPath(child.drop_prob) if child.drop_prob else nn.Identity())
    return model


def draw_drop_path(model: nn.Module, seeds: Tensor | None) -> None:
    """Settle which samples pass which branch in the next forward pass. seeds: int64 (B,) on the CPU."""
    paths = [module for module in model.modules() if isinstance(module, SampleDropPath)]
    if not paths:
        return
    assert seeds is not None, "training with drop_path needs dropout_seeds, one for each sample"
    generator = torch.Generator()
    # Not the seed itself: the head's dropout begins with that.
    draws = torch.stack([torch.rand(len(paths), generator=generator.manual_seed(~seed)) for seed in seeds.tolist()], dim=1)
    for path, draw in zip(paths, draws, strict=True):
        path.keep = (draw >= path.rate) / (1 - path.rate)


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
