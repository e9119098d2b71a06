"""The table of architectures. A size is a row here and nothing else."""

from dataclasses import dataclass

from model import ModelError


@dataclass(frozen=True)
class Arch:
    """A plain vision transformer with a deconvolution head.

    embed_dim, head_deconv and head_conv are channels; patch_size is in pixels. The feed-forward width is four times
    embed_dim, and each of the head's transposed convolutions doubles the resolution.
    """

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    head_deconv: tuple[int, ...] = (768, 768, 768)
    head_conv: tuple[int, ...] = (768, 768, 768)

    def check(self, image_size: tuple[int, int], patch_padding: int) -> None:
        """Raises ModelError if images of (height, width) are not whole patches, or the padding would add to the grid."""
        if any(side <= 0 or side % self.patch_size for side in image_size):
            raise ModelError(
                f"image_size: {image_size[0]}x{image_size[1]} (height x width) is not whole patches, "
                f"choose multiples of {self.patch_size} for {self.name}"
            )
        if not 0 <= 2 * patch_padding < self.patch_size:
            raise ModelError(
                f"patch_padding: {patch_padding} must be at least 0 and under half the patch of {self.patch_size}"
            )


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sapiens_0.3b", embed_dim=1024, depth=24, num_heads=16),
        Arch("sapiens_0.6b", embed_dim=1280, depth=32, num_heads=16),
        Arch("sapiens_1b", embed_dim=1536, depth=40, num_heads=24),
        Arch("sapiens_2b", embed_dim=1920, depth=48, num_heads=32),
        # Small enough to learn 128x96 images on a CPU: for the demo and the tests.
        Arch("tiny", embed_dim=96, depth=4, num_heads=3, patch_size=8, head_deconv=(48, 32, 24), head_conv=(24,)),
    )
}


def get_arch(name: str) -> Arch:
    """The architecture of that name. Raises ModelError, listing the known ones."""
    if name not in ARCHS:
        raise ModelError(f"arch: {name!r} is unknown, choose one of {', '.join(ARCHS)}")
    return ARCHS[name]
