"""The table of architectures. A size is a row here and nothing else."""

from dataclasses import dataclass
from functools import cache

from model import ModelError

TIMM = "timm:"  # before the name of any vision transformer of timm's
FEATURES = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}  # to create one without its own head


@dataclass(frozen=True)
class Arch:
    """A plain vision transformer with a deconvolution head.

    family is "sapiens" (learned positions, LayerNorm, GELU), "sapiens2" (RoPE, RMSNorm, SwiGLU, grouped queries in all
    but the first and last eight blocks) or "timm"; timm_name is what timm calls the backbone of the latter two.
    embed_dim, head_deconv and head_conv are channels; patch_size is in pixels; mlp_ratio is the feed-forward width over
    embed_dim. Each of the head's transposed convolutions doubles the resolution.
    """

    name: str
    family: str
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    head_deconv: tuple[int, ...]
    head_conv: tuple[int, ...]
    timm_name: str = ""
    mlp_ratio: float = 4.0

    @property
    def patch_padding(self) -> int:
        """The zero padding of the patch convolution, in pixels, that this family was pre-trained with."""
        return 2 if self.family == "sapiens" else 0

    def padding(self, given: int | None) -> int:
        """The patch convolution's: what is given, or for None what this family was pre-trained with."""
        return self.patch_padding if given is None else given

    @property
    def licence(self) -> str:
        """Of the weights that Meta released for this family."""
        repositories = {"sapiens": "sapiens/blob/main/LICENSE", "sapiens2": "sapiens2/blob/main/LICENSE.md"}
        return f"https://github.com/facebookresearch/{repositories[self.family]}" if self.family in repositories else ""

    def check(self, image_size: tuple[int, int], patch_padding: int) -> None:
        """Raises ModelError if images of (height, width) are not whole patches, or this family has no such padding."""
        if any(side <= 0 or side % self.patch_size for side in image_size):
            raise ModelError(
                f"image_size: {image_size[0]}x{image_size[1]} (height x width) is not whole patches, "
                f"choose multiples of {self.patch_size} for {self.name}"
            )
        if self.family != "sapiens" and patch_padding != 0:
            raise ModelError(f"patch_padding: {patch_padding} must be 0 for {self.name}, only Sapiens v1 pads its patches")
        if not 0 <= 2 * patch_padding < self.patch_size:
            raise ModelError(f"patch_padding: {patch_padding} must be at least 0 and under half the patch of {self.patch_size}")


def _sapiens(name: str, embed_dim: int, depth: int, num_heads: int) -> Arch:
    return Arch(name, "sapiens", embed_dim, depth, num_heads, 16, (768, 768, 768), (768, 768, 768))


def _sapiens2(name: str, timm_name: str, embed_dim: int, depth: int, num_heads: int) -> Arch:
    deconv, conv = (512, 256, 128, 64), (64, 64)
    return Arch(name, "sapiens2", embed_dim, depth, num_heads, 16, deconv, conv, f"vit_{timm_name}_patch16_sapiens2")


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        _sapiens("sapiens_0.3b", 1024, 24, 16),
        _sapiens("sapiens_0.6b", 1280, 32, 16),
        _sapiens("sapiens_1b", 1536, 40, 24),
        _sapiens("sapiens_2b", 1920, 48, 32),
        _sapiens2("sapiens2_0.1b", "base", 768, 12, 12),
        _sapiens2("sapiens2_0.4b", "large", 1024, 24, 16),
        _sapiens2("sapiens2_0.8b", "huge", 1280, 32, 16),
        _sapiens2("sapiens2_1b", "giant", 1536, 40, 24),
        _sapiens2("sapiens2_5b", "5b", 2432, 56, 32),
        # Small enough to learn 128x96 images on a CPU: for the demo and the tests.
        Arch("tiny", "sapiens", 96, 4, 3, 8, head_deconv=(48, 32, 24), head_conv=(24,)),
        Arch("tiny2", "sapiens2", 96, 4, 3, 8, (48, 32, 24), (24,), "vit_base_patch16_sapiens2"),
    )
}


def get_arch(name: str) -> Arch:
    """The architecture of that name, or of `timm:NAME`, timm's with the head of Sapiens2.

    Raises ModelError, listing the known ones; for a model of timm's that is no plain vision transformer; and if timm
    isn't the version for it.
    """
    if name.startswith(TIMM):
        return _timm_arch(name)
    if name not in ARCHS:
        raise ModelError(
            f"arch: {name!r} is unknown, choose one of {', '.join(ARCHS)}, or {TIMM}NAME for a vision transformer of timm's"
        )
    return ARCHS[name]


@cache
def _timm_arch(name: str) -> Arch:
    import timm  # takes seconds, which most uses of the table need not wait for
    import torch

    timm_name = name.removeprefix(TIMM).partition(".")[0]  # the part after the dot names weights, not a shape
    if not timm.is_model(timm_name):
        similar = ", ".join(timm.list_models(f"*{timm_name[:12]}*")[:5]) or "none that begins so"
        raise ModelError(f"arch: timm {timm.__version__} has no model {timm_name!r}; it has {similar}")
    try:
        with torch.device("meta"):
            model = timm.create_model(timm_name, **FEATURES)
    except TypeError as error:
        raise ModelError(f"arch: {name} cannot take images of other sizes ({error}), choose a plain ViT") from None
    blocks, patch_size = getattr(model, "blocks", None), getattr(getattr(model, "patch_embed", None), "patch_size", (0, 1))
    strides = {info["reduction"] for info in getattr(model, "feature_info", ())}
    if not hasattr(model, "forward_intermediates") or not blocks or strides != {patch_size[0]}:
        raise ModelError(f"arch: {name} is no plain vision transformer: its features differ in resolution; choose a plain ViT")
    if patch_size[0] != patch_size[1]:
        raise ModelError(f"arch: {name} has patches of {patch_size[0]}x{patch_size[1]} pixels, only square ones will do")
    heads = getattr(blocks[0].attn, "num_heads", 0)
    return Arch(name, "timm", model.embed_dim, len(blocks), heads, patch_size[0], (512, 256, 128, 64), (64, 64), timm_name)
