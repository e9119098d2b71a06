"""What checking and packing raw pairs costs: images a second on one core, beside a plain loop that does the same work.

    .venv/bin/python -m benchmarks.packing [--root FACESYNTHETICS_FOLDER]

Both write the same tar and take turns in one process. The plain loop finds less: it takes truncated and damaged files.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from webdataset import TarWriter

from data.labels import load_label_set
from data.prepare import Rules, prepare
from data.sources import RawExample
from data.synthetic import draw_face
from data.tars import write_tar

ROUNDS = 10
NOISE = 2.0  # of a sensor, in gray levels: drawn faces then take as many bytes as rendered ones
FACE19 = load_label_set("face19")


def draw(root: Path, count: int, size: tuple[int, int], suffix: str) -> list[RawExample]:
    """Faces stretched to (width, height)."""
    for i in range(count):
        image, mask = draw_face(0, i, 512)
        noise = np.random.default_rng(i).normal(0, NOISE, (size[1], size[0], 3))
        image = np.clip(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) + noise, 0, 255).astype(np.uint8)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
        options = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []
        cv2.imwrite(str(root / f"{i:06d}{suffix}"), image[..., ::-1], options)
        cv2.imwrite(str(root / f"{i:06d}_seg.png"), mask)
    return examples(root, suffix)


def examples(root: Path, suffix: str = ".png") -> list[RawExample]:
    masks = sorted(root.glob("*_seg.png"))
    return [RawExample(mask.stem[:-4], mask.with_name(mask.stem[:-4] + suffix), mask) for mask in masks]


def plain_loop(pairs: list[RawExample], path: Path) -> None:
    allowed = {*range(FACE19.num_classes), FACE19.ignore_index}
    with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
        for pair in pairs:
            image = cv2.imread(str(pair.image))
            mask = cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED)
            if image.shape[:2] != mask.shape or not set(np.unique(mask).tolist()) <= allowed:
                raise ValueError(pair.key)
            files = pair.image.read_bytes(), pair.mask.read_bytes()
            digests = [hashlib.sha256(content).hexdigest() for content in files]
            suffix = pair.image.suffix[1:]
            tar.write({"__key__": pair.key, suffix: files[0], "mask.png": files[1], "json": repr(digests).encode()})


def this_repository(pairs: list[RawExample], path: Path) -> None:
    rules = Rules(masks=FACE19, target=FACE19)
    write_tar((prepare(pair, rules) for pair in pairs), path, FACE19)
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def seconds(pack: Callable, pairs: list[RawExample], path: Path) -> float:
    start = time.process_time()
    pack(pairs, path)
    return time.process_time() - start


def compare(title: str, pairs: list[RawExample], work: Path) -> None:
    sides, tar = (plain_loop, this_repository), work / "a.tar"
    rounds = [[seconds(pack, pairs, tar) for pack in sides] for _ in range(ROUNDS)]
    # The best round of each: whatever else runs on the machine only ever slows one down.
    plain, ours = (len(pairs) / min(column) for column in zip(*rounds, strict=True))
    size = sum(pair.image.stat().st_size for pair in pairs) / len(pairs) / 1000
    print(f"{title:24}{size:8.0f} kB{plain:10.1f}/s{ours:10.1f}/s{ours / plain:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="real pairs instead of the drawn 512x512 ones")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"{'pairs':24}{'image':>11}{'plain':>12}{'ours':>12}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        small.mkdir(), large.mkdir()
        if args.root:
            compare(args.root.name, examples(args.root), Path(folder))
        else:
            compare("512x512 PNG", draw(small, 24, (512, 512), ".png"), Path(folder))
        compare("2000x1500 JPEG q90", draw(large, 8, (2000, 1500), ".jpg"), Path(folder))


if __name__ == "__main__":
    main()
