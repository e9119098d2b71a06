"""Shows what is in a shard set, before a GPU is busy with it.

    python -m data.inspect shards/face          # train/ and val/, or one split

Prints sizes, class frequencies, class weights to start from and classes with hardly any example, reads every file against
its sha256, and draws a contact sheet: photo and labels, and beside them both as the mirror shows them. There the left
eye must have the colour that the eye on that side had before; where it has not, a flip pair is wrong.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from data import DataError
from data.loader import decode
from data.pictures import contact_sheet, save_png
from data.shards import INDEX, ShardSet, verify
from data.statistics import balanced_weights, images_showing

SIZES_READ = 1000  # images whose size is looked up, evenly spaced
SHEET_POOL = 2000  # images among which the sheet's are chosen


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 sound, 1 a file is damaged, 2 nothing to inspect."""
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a split, or the folder that holds train/ and val/; also a URL")
    parser.add_argument("--pictures", type=int, default=8, help="examples on the contact sheet (default 8)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the contact sheets (default: here)")
    parser.add_argument("--no-checksums", action="store_true", help="do not read all files")
    args = parser.parse_args(argv)
    try:
        sound = [inspect(location, args) for location in _splits(args.folder)]
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(sound) else 1


def inspect(location: str, args: argparse.Namespace) -> bool:
    """Prints and draws one split, if its files are what they were when packed; else names each that is not. Returns which."""
    if problems := verify(location, checksums=not args.no_checksums):
        for problem in problems:
            print(f"damaged: {problem}")
        print(f"{location}: damaged files: {len(problems)}; copy them again or build the set again\n")
        return False
    shards = ShardSet.open(location)
    megabytes = sum(shards.shard_sizes()) / 1e6
    print(f"{shards.location}: {len(shards)} images in {len(shards.shard_starts)} shards, {megabytes:.1f} MB")
    print(_sizes(shards))
    print(_class_table(shards))
    for warning in shards.label_set.warnings():
        print(f"warning: {warning}")
    if args.pictures > 0:
        path = args.output / f"inspect_{Path(shards.location).parent.name}_{Path(shards.location).name}.png"
        save_png(path, example_sheet(shards, args.pictures))
        print(f"contact sheet  {os.path.relpath(path)}")
    if not args.no_checksums:
        print("checksums: all files are what they were when packed")
    print()
    return True


def _splits(folder: str) -> list[str]:
    found = [str(Path(folder) / name) for name in ("train", "val") if (Path(folder) / name / INDEX).is_file()]
    return found or [folder]


def _sizes(shards: ShardSet) -> str:
    chosen = np.unique(np.linspace(0, len(shards) - 1, SIZES_READ).astype(int))
    sizes = np.array([(meta["height"], meta["width"]) for meta in (shards.read(int(i)).meta for i in chosen)])
    area = sizes.prod(axis=1)
    by_area = sizes[np.argsort(area)]
    of = "" if len(chosen) == len(shards) else f" of {len(chosen)} looked at"
    places = {"smallest": 0, "median": len(area) // 2, "largest": -1}
    named = (f"{name} {by_area[i][0]}x{by_area[i][1]}" for name, i in places.items())
    return f"height x width{of}: {', '.join(named)}"


def _class_table(shards: ShardSet) -> str:
    label_set, counts = shards.label_set, shards.pixel_counts
    images = images_showing(shards.image_pixel_counts)
    partner = {a: b for pair in label_set.flip_pairs for a, b in (pair, pair[::-1])}
    weights = balanced_weights(counts)
    width = max(len(name) for name in label_set.classes)
    lines = [f"{'class':<{width}}  % of pixels   images   weight  mirrored to"]
    for i, name in enumerate(label_set.classes):
        share = 100 * counts[i] / max(counts.sum(), 1)
        remark = ""
        if i not in shards.labelled:
            remark = "not labelled in this set: takes no part"
        elif images[i] < few_images(len(shards)):
            remark = "never occurs" if not images[i] else f"hardly any example: {images[i]} images"
        mirrored = label_set.classes[partner[i]] if i in partner else "-"
        numbers = f"{share:11.4f}  {images[i]:7d}  {weights[i]:7.2f}"
        lines.append(f"{name:<{width}}  {numbers}  {mirrored:<{width}}  {remark}".rstrip())
    lines.append(f"loss.class_weights=[{','.join(f'{weight:.2f}' for weight in weights)}]  (what auto takes)")
    return "\n".join(lines)


def few_images(images: int) -> float:
    """Of how many examples on a class of a set of so many images has enough: 20, or a tenth of less than 200 images, but one in
    a thousand of a large set. Rarer, it is in one batch of 32 in thirty, and the steps between forget it."""
    return max(min(20, images / 10), images / 1000)


def example_sheet(shards: ShardSet, pictures: int) -> np.ndarray:
    """RGB uint8 (h, w, 3): so many examples that show many classes, and their mirror images. Raises DataError."""
    table = shards.label_set.flip_table()
    rows = []
    for i in _telling_images(shards, pictures):
        image, label = decode(shards.read(i))
        rows.append([image, label, image[:, ::-1], table[label[:, ::-1]]])
    return contact_sheet(rows, ["photo", "labels", "mirrored photo", "mirrored labels"], shards.label_set, tile=176)


def _telling_images(shards: ShardSet, count: int) -> list[int]:
    """Images that show as many classes as possible between them."""
    pool = np.unique(np.linspace(0, len(shards) - 1, SHEET_POOL).astype(int))
    shown = shards.image_pixel_counts[pool] > 0
    chosen: list[int] = []
    missing = np.ones(shown.shape[1], bool)
    for _ in range(min(count, len(pool))):
        score = 100 * (shown & missing).sum(axis=1) + shown.sum(axis=1)
        score[chosen] = -1
        best = int(score.argmax())
        chosen.append(best)
        missing &= ~shown[best]
    return [int(pool[i]) for i in chosen]


if __name__ == "__main__":
    sys.exit(main())
