"""Masks of photos, each of its own size: one command from a model file and pictures to pictures.

python -m model.predict --weights outputs/demo/run/model.safetensors --input photos --output masks

For each image (sub-folders and names are kept) it writes

    OUTPUT/mask/NAME.png              class numbers, with the classes' colours as palette
    OUTPUT/overlay/NAME.jpg           the photo tinted in the classes' colours, class 0 left as it is
    OUTPUT/foreground/NAME.png        --foreground: 255 for every class but 0
    OUTPUT/probabilities/NAME.npz     --probabilities: float16 (classes, height, width); large: 2 bytes for each before
                                      compression, 400 MB for 19 classes of a photo of 4000x3000 pixels
    OUTPUT/classes.json               what each number and colour means

EXIF orientation is applied first. Unreadable images are named and skipped; the exit code is 1 then.
"""

import argparse
import json
import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from model import ModelError
from model.images import UnreadableImage, find_images, read_image, save
from model.inference import Picture, Predictor
from model.trained import load_segmenter

KINDS = ("mask", "overlay", "foreground", "probabilities")
THREADS = min(8, os.cpu_count() or 1)  # that read and write


@dataclass(frozen=True)
class Classes:
    """What a model's class numbers mean: `palette` is RGB uint8 (256, 3); flip_pairs is None where it is not known."""

    names: tuple[str, ...]
    palette: np.ndarray
    flip_pairs: list[list[int]] | None

    @classmethod
    def of(cls, metadata: dict[str, Any], count: int) -> "Classes":
        """From a weight file's metadata, and generated where it tells nothing. Raises ModelError if the two disagree."""
        label_set = metadata.get("label_set") or {}
        entries = label_set.get("classes") or [{} for _ in range(count)]
        if len(entries) != count or count > 256:
            raise ModelError(f"--weights: label_set: {len(entries)} classes, the model has {count}, and a mask can hold 256")
        names = tuple(entry.get("name", f"class {i}") for i, entry in enumerate(entries))
        palette = np.zeros((256, 3), np.uint8)
        palette[:count] = [entry.get("color", _color(i)) for i, entry in enumerate(entries)]
        return cls(names, palette, label_set.get("flip_pairs"))


def _color(i: int) -> list[int]:
    """The PASCAL VOC palette: the bits of i dealt out to red, green and blue, the lowest ones to the highest places."""
    return [sum((i >> 3 * place + channel & 1) << 7 - place for place in range(3)) for channel in range(3)]


def predict_files(
    predictor: Predictor, images: Collection[Path], batch_size: int, write: Callable[[Picture], Callable[[], None]]
) -> list[Path]:
    """Reads, predicts and writes every image; threads decode and write files while the model works.

    Args:
        write: takes what it needs of a predicted picture, and returns what writes it, which runs in a thread.

    Returns:
        The unreadable images, each of which has been named on stderr.

    Raises:
        OSError: a result cannot be written.
    """
    unreadable: list[Path] = []
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(images), unit="image", disable=None) as bar:

        def pictures() -> Iterator[Picture]:
            for path, reading in _ahead(pool, lambda path: predictor.prepare(path, read_image(path)), images):
                try:
                    yield reading.result()
                except UnreadableImage as error:
                    unreadable.append(path)
                    tqdm.write(f"skipped {path}: {error}", file=sys.stderr)
                    bar.update()

        writing: deque[Future] = deque()
        for picture in predictor.run(pictures(), batch_size):
            writing.append(pool.submit(write(picture)))
            if len(writing) > THREADS:
                writing.popleft().result()
            bar.update()
        for task in writing:
            task.result()
    return unreadable


def _ahead(pool: ThreadPoolExecutor, read: Callable[[Path], Picture], paths: Iterable[Path]) -> Iterator[tuple[Path, Future]]:
    """A few readings ahead of the one that is waited for: large photos must not pile up in memory."""
    waiting: deque[tuple[Path, Future]] = deque()
    for path in paths:
        waiting.append((path, pool.submit(read, path)))
        if len(waiting) > THREADS:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class Writer:
    """Writes what is wanted of each picture. names: for each image, that of its results."""

    predictor: Predictor
    classes: Classes
    output: Path
    names: dict[Path, Path]
    foreground: bool = False
    probabilities: bool = False

    def __call__(self, picture: Picture) -> Callable[[], None]:
        """See predict_files."""
        mask = self.predictor.mask(picture)
        probabilities = self.predictor.probabilities(picture) if self.probabilities else None
        return partial(self._write, self.names[picture.key], picture.image, mask, probabilities)

    def _write(self, name: Path, image: np.ndarray, mask: np.ndarray, probabilities: np.ndarray | None) -> None:
        def path(kind: str, suffix: str) -> Path:
            return self.output / kind / f"{name}{suffix}"

        indexed = Image.fromarray(mask)
        indexed.putpalette(self.classes.palette.tobytes())
        save(path("mask", ".png"), lambda file: indexed.save(file, "PNG"))
        tinted = Image.fromarray(overlay(image, mask, self.classes.palette))
        save(path("overlay", ".jpg"), lambda file: tinted.save(file, "JPEG", quality=90, subsampling=0))
        if self.foreground:
            binary = Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8))
            save(path("foreground", ".png"), lambda file: binary.save(file, "PNG"))
        if probabilities is not None:
            save(path("probabilities", ".npz"), lambda file: np.savez_compressed(file, probabilities=probabilities))


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """RGB uint8 (h, w, 3): half image, half the colour of its class; class 0, the background, shows the image."""
    tinted = cv2.addWeighted(image, 0.5, palette[mask], 0.5, 0)
    return np.where(mask[..., None] > 0, tinted, image)


def _claim(output: Path, classes: Classes) -> None:
    """Write classes.json, unless the folder holds somebody's own masks: those would be overwritten."""
    legend = output / "classes.json"
    for kind in KINDS:
        if (output / kind).exists() and not legend.exists():
            raise ModelError(f"{output}: has a folder {kind!r} that no prediction wrote; name another --output")
    entries = [{"id": i, "name": name, "color": classes.palette[i].tolist()} for i, name in enumerate(classes.names)]
    save(legend, lambda file: file.write(json.dumps({"classes": entries}, indent=1).encode()))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for it
        raise ModelError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def _at_least_one(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="model.safetensors of a training run, or an export of it")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders with their sub-folders, 'patterns/**/*.jpg'")
    parser.add_argument("--output", type=Path, required=True, help="a folder; earlier results in it are overwritten")
    parser.add_argument("--foreground", action="store_true", help="write foreground masks too")
    parser.add_argument("--probabilities", action="store_true", help="write the probabilities of all classes too")
    parser.add_argument("--batch-size", type=_at_least_one, default=4, metavar="N")
    parser.add_argument("--flip", action="store_true", help="average with the mirror image, left and right classes exchanged")
    parser.add_argument(
        "--window", type=float, nargs="?", const=math.inf, metavar="N",
        help="look at the photo at its own resolution, in overlapping windows of the model's image size whose logits are "
        "averaged; with N, shrunk to at most N times the size at which it covers one window",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    args = parser.parse_args(arguments)
    if args.window is not None and not args.window >= 1:
        parser.error(f"argument --window: {args.window} must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # on odd EXIF blocks; what matters raises
    images = find_images(args.input, [args.output / kind for kind in KINDS])
    for folder in filter(os.path.isdir, args.input):
        if args.output.resolve().is_relative_to(os.path.realpath(folder)):
            print(f"note: {args.output} lies inside {folder}; its results are not taken as images", file=sys.stderr)
    device = _device(args.device)
    model, metadata = load_segmenter(args.weights)
    classes = Classes.of(metadata, model.num_classes)
    if args.flip and classes.flip_pairs is None:
        raise ModelError(f"{args.weights}: label_set: tells no flip_pairs, so that --flip would mix left and right; leave it out")
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    keep_aspect = metadata.get("keep_aspect", False)
    predictor = Predictor(model, keep_aspect, classes.flip_pairs if args.flip else None, args.window)
    _claim(args.output, classes)
    writer = Writer(predictor, classes, args.output, images, args.foreground, args.probabilities)
    unreadable = predict_files(predictor, images, args.batch_size, writer)
    print(f"{len(images) - len(unreadable)} of {len(images)} images predicted: {args.output}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory does not suffice; lower --batch-size, or give --window a smaller N")
    except (ModelError, OSError) as error:
        sys.exit(f"error: {error}")
