"""A small raw folder in the FaceSynthetics layout, and the command that packs it."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.build_shards import main

SIZE = (24, 32)  # height, width


def smooth(rng: np.random.Generator) -> np.ndarray:
    return np.cumsum(rng.integers(0, 3, (*SIZE, 3)), axis=1).astype(np.uint8)


def draw(root: Path, n: int) -> Path:
    """A FaceSynthetics folder of n small examples."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rng = np.random.default_rng(i)
        mask = rng.integers(0, 19, SIZE).astype(np.uint8)
        mask[0, :3] = 255
        Image.fromarray(smooth(rng)).save(root / f"{i:06d}.png")
        Image.fromarray(mask).save(root / f"{i:06d}_seg.png")
        (root / f"{i:06d}_ldmks.txt").write_text("1.0 2.0\n")
    return root


def run(root: Path, out: Path, *options: object) -> int:
    arguments = ["--dataset", "facesynthetics", "--root", root, "--out", out, "--workers", 1, *options]
    return main([str(argument) for argument in arguments])


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
