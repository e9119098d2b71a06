"""What a training example costs on the CPU, from the shard to the training process: ours beside the usual pipeline.

    python -m benchmarks.data_pipeline [--root FOLDER] [--seconds N]

The usual pipeline: webdataset, Pillow, the original's augmentation (reference_pipeline.py) and a torch DataLoader, on
images as they were downloaded. Both sides have one worker, and their processor time is that of all processes. "on device" is what
the loader takes with `augment.on_device`: the views themselves would then be made by the training device, and are not made here.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.reference_pipeline import ReferencePipeline
from data.arguments import whole_number
from data.augment import AugmentConfig, Colour, draw_view
from data.codecs import decode_image, decode_mask
from data.labels import load_label_set
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture, MixtureEntry
from data.order import BatchPlan
from data.render import render
from data.shards import ShardSet
from data.synthetic import draw_face

ROOT = Path(__file__).parent.parent
WORK = ROOT / "outputs/data_pipeline"
SIZE = (1024, 768)
BATCH = 4
WARM_UP = 6  # batches
SENSOR_NOISE = 6.0  # gray levels, of the photos; the drawn faces have some already
LABELS = load_label_set("face19")
# Title, raw folder, options of the build, shards of the usual pipeline, times faster that we want to be.
ROWS = [
    ("512 PNG, as it is", "png", [], "png", 5),
    ("512 QOI", "png", ["--encode", "lossless"], "png", 7),
    ("2000x1500 JPEG q90, as it is", "jpeg", [], "jpeg", 3),
    ("max. 1000 JPEG q95", "jpeg", ["--encode", "jpeg", "--jpeg-quality", "95", "--max-side", "1000"], "jpeg", 6),
]


def draw_photos(root: Path | None, count: int) -> None:
    """WORK/png: drawn 512x512 faces, or those of `root`; WORK/jpeg: the same as noisy photos of 3 megapixels."""
    rng = np.random.default_rng(0)
    for folder in ("png/images", "png/masks", "jpeg/images", "jpeg/masks"):
        (WORK / folder).mkdir(parents=True)
    masks = sorted(root.glob("*_seg.png"))[:count] if root else range(count)
    for i, mask_path in enumerate(masks):
        if root:
            mask = cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED)
            image = cv2.imread(str(mask_path.with_name(mask_path.name.replace("_seg", ""))))[..., ::-1]
        else:
            image, mask = draw_face(0, i, 512)
        large = cv2.resize(image, (1500, 2000), interpolation=cv2.INTER_CUBIC)
        large = np.clip(large + rng.normal(0, SENSOR_NOISE, large.shape), 0, 255).astype(np.uint8)
        (WORK / f"jpeg/images/{i:04d}.jpg").write_bytes(simplejpeg.encode_jpeg(large, 90, "RGB", "420"))
        large = cv2.resize(mask, (1500, 2000), interpolation=cv2.INTER_NEAREST_EXACT)
        cv2.imwrite(str(WORK / f"jpeg/masks/{i:04d}.png"), large)
        cv2.imwrite(str(WORK / f"png/images/{i:04d}.png"), image[..., ::-1])
        cv2.imwrite(str(WORK / f"png/masks/{i:04d}.png"), mask)


def build(raw: str, name: str, options: list[str]) -> Path:
    """Packs WORK/raw; returns the folder of the training split."""
    out = WORK / "shards" / name
    command = ["--dataset", "pairs", "--root", WORK / raw, "--out", out, "--label-set", "face19", "--val-fraction", "0"]
    command = [sys.executable, "-m", "data.build_shards", *map(str, command), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out / "train"


def our_batches(folder: Path, on_device: bool = False) -> Iterator[torch.Tensor]:
    mixture = Mixture.open([MixtureEntry(path=str(folder))])
    examples = TrainExamples(mixture, mixture.order(seed=0), SIZE, AugmentConfig(on_device=on_device))
    for (batch,) in train_batches(examples, BatchPlan(BATCH, BATCH, 0, 1), 0, 1 << 20, workers=1):
        yield batch.images


def our_patches(folder: Path) -> Iterator[torch.Tensor]:
    return our_batches(folder, on_device=True)


def usual_batches(folder: Path) -> Iterator[torch.Tensor]:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).repeat()
    dataset = dataset.decode(webdataset.handle_extension("mask.png", gray), "rgb8")
    dataset = dataset.map(Usual(ReferencePipeline(SIZE, LABELS.flip_pairs)))
    for images, _ in DataLoader(dataset, batch_size=BATCH, num_workers=1, worker_init_fn=one_thread):
        yield images


class Usual:
    """A decoded webdataset sample -> what the DataLoader batches."""

    def __init__(self, augment: ReferencePipeline) -> None:
        self.augment = augment

    def __call__(self, sample: dict) -> tuple[np.ndarray, np.ndarray]:
        image = sample["png"] if "png" in sample else sample["jpg"]
        return self.augment(image, sample["mask.png"])


def gray(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)))


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def cpu_seconds() -> float:
    """Of this process and its children so far."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def cost(make: Callable[[Path], Iterator[torch.Tensor]], folder: Path, seconds: float) -> float:
    """CPU milliseconds an image, in the steady state."""
    with closing(make(folder)) as batches:
        for _ in islice(batches, WARM_UP):
            pass
        images, cpu, end = 0, cpu_seconds(), time.monotonic() + seconds
        for batch in batches:
            images += len(batch)
            if time.monotonic() > end:
                break
        return (cpu_seconds() - cpu) / images * 1000


def steps(folder: Path, count: int = 100) -> tuple[float, float, float]:
    """(kB of an encoded image, CPU ms to decode image and mask, to draw and render the view), without a loader."""
    shards, rng, config = ShardSet.open(folder), np.random.default_rng(0), AugmentConfig()
    images, labels = np.empty((BATCH, *SIZE, 3), np.uint8), np.empty((BATCH, *SIZE), np.uint8)
    table, spent, size = LABELS.flip_table(), np.zeros(4), 0
    for i, index in enumerate(islice(cycle(range(len(shards))), count)):
        sample = shards.read(index)
        times = [time.process_time()]
        label = decode_mask(sample.mask)
        times.append(time.process_time())
        view = draw_view(label, SIZE, config, rng)
        times.append(time.process_time())
        image = decode_image(sample.image, view.shrink)
        times.append(time.process_time())
        render(image, label, view, table, LABELS.ignore_index, images[i % BATCH], labels[i % BATCH])
        times.append(time.process_time())
        spent, size = spent + np.diff(times), size + len(sample.image)
    mask, view, image, rendering = spent / count * 1000
    return size / count / 1000, mask + image, view + rendering


def print_costs(folders: dict[str, Path], seconds: float) -> None:
    print(f"\nCPU ms an image of {SIZE[0]}x{SIZE[1]}, one worker")
    print(f"{'':30}    kB   usual   ours  ratio  wanted  on device | decode  view  (ours, without the loader)")
    for title, _, _, usual, wanted in ROWS:
        sides = {our_batches: title, usual_batches: usual, our_patches: title}
        # In turns: the machine's pace changes.
        times = [[cost(side, folders[name], seconds) for side, name in sides.items()] for _ in range(2)]
        ours, theirs, patches = np.mean(times, axis=0)
        size, decode, view = steps(folders[title])
        loaders = f"{theirs:8.1f}{ours:7.1f}{theirs / ours:7.1f}{wanted:8}{patches:11.1f}"
        print(f"{title:30}{size:6.0f}{loaders} | {decode:6.1f}{view:6.1f}")


def print_quality(folder: Path, count: int = 24) -> None:
    """The fast rendering beside the step by step one, of the same views."""
    shards = ShardSet.open(folder)
    still = AugmentConfig(photometric=False, rotate_probability=0)
    cases = {
        "enlarged": still.model_copy(update={"scale": (0.7, 2.0)}),
        "shrunk and enlarged again": still.model_copy(update={"scale": (0.2, 0.6)}),
        "enlarged, rotated": still.model_copy(update={"scale": (0.7, 2.0), "rotate_probability": 1.0}),
        "enlarged, colours": still.model_copy(update={"scale": (0.7, 2.0), "photometric": True}),
        "all as configured": AugmentConfig(),
    }
    print(f"\nfast beside step by step, 512 source{'PSNR dB':>10}{'mask agrees %':>16}")
    for title, config in cases.items():
        squares, same = [], []
        for i in range(count):
            sample = shards.read(i % len(shards))
            image, label = decode_image(sample.image), decode_mask(sample.mask)
            drawn = draw_view(label, SIZE, config, np.random.default_rng(i))
            outs = []
            for view in (drawn, replace(drawn, faithful=True)):
                out = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint8)
                render(image, label, view, LABELS.flip_table(), LABELS.ignore_index, *out)
                outs.append(out)
            shown = outs[0][1] != LABELS.ignore_index
            if config.photometric and not config.rotate_probability and drawn.colour == Colour():
                continue
            squares.append(np.mean((outs[0][0][shown].astype(float) - outs[1][0][shown]) ** 2))
            same.append((outs[0][1] == outs[1][1]).mean())
        print(f"{title:34}{10 * np.log10(255**2 / np.mean(squares)):12.1f}{100 * np.mean(same):16.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a real FaceSynthetics folder instead of drawn faces")
    parser.add_argument("--seconds", type=float, default=6, help="of each of the 24 measurements")
    parser.add_argument("--count", type=whole_number(1), default=32, help="images")
    args = parser.parse_args()
    if args.root and not any(args.root.glob("*_seg.png")):
        parser.error(f"{args.root}: no *_seg.png is in there")
    cv2.setNumThreads(0)
    shutil.rmtree(WORK, ignore_errors=True)
    draw_photos(args.root, args.count)
    folders = {title: build(raw, str(i), options) for i, (title, raw, options, _, _) in enumerate(ROWS)}
    folders |= {"png": folders[ROWS[0][0]], "jpeg": folders[ROWS[2][0]]}
    print_costs(folders, args.seconds)
    print_quality(folders["png"])


if __name__ == "__main__":
    main()
