"""Scores on a validation split, at each mask's own resolution.

python -m train.evaluate --weights outputs/demo/run/model.safetensors --data outputs/demo/shards/val
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import DataError
from data.arguments import whole_number
from data.labels import LabelSet
from data.loader import ValidationExamples, validation_batches
from data.order import validation_positions
from data.pictures import save_png
from data.shards import ShardSet
from model import ModelError
from model.trained import load_segmenter
from train.loss import UNSEEN, check_labels
from train.metrics import ConfusionMatrix, Scores
from train.showcase import Groups, Judged, Showcase, sheet


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    shards: ShardSet,
    image_size: tuple[int, int],
    device: torch.device,
    batch_size: int = 4,
    workers: int = 0,
    pictures: int = 8,
    keep_aspect: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Scores, Groups]:
    """Score a model on every image once; all ranks get the same scores. Every rank of the job must call it.

    Args:
        forward: uint8 images (B, 3, H, W) on `device` -> logits (B, C, h, w).
        pictures: how many of each group of images are kept to be looked at.
        keep_aspect: whether images are padded to the input's shape, as in training; else they are stretched.
    Returns:
        The scores, and on rank 0 images of the groups "examples", "worst" and "best".
    """
    label_set = shards.label_set
    matrix = ConfusionMatrix(label_set.num_classes, label_set.ignore_index, device)
    indices = iter(validation_positions(len(shards), rank, world_size))
    showcase = Showcase(pictures)
    examples = ValidationExamples(shards, image_size, keep_aspect)
    unlabelled = [i for i in range(label_set.num_classes) if i not in shards.labelled]  # no answer of theirs can be right
    for batch in validation_batches(examples, batch_size, rank, world_size, workers):
        check_labels(batch.pixel_counts, label_set)
        logits = forward(batch.images.to(device))
        for key, image_logits, label, place in zip(batch.keys, logits, batch.labels, batch.places, strict=True):
            # One image at a time: full-size logits of a whole batch of photos would not fit.
            image_logits = image_logits[None].float()
            image_logits[:, unlabelled] = UNSEEN
            if (place.height, place.width) != tuple(image_size):
                at_input = F.interpolate(image_logits, image_size, mode="bilinear")
                image_logits = place.of(at_input.movedim(1, -1)[0]).movedim(-1, 0)[None]
            prediction = F.interpolate(image_logits, label.shape, mode="bilinear").argmax(1)[0]
            counts = matrix.update(prediction, torch.from_numpy(label).to(device))
            index = next(indices)
            if pictures and index < len(shards):
                miou = Scores(counts.cpu().numpy()).miou
                if showcase.wants(miou, index):
                    showcase.keep(Judged(index, key, miou, None, label, prediction.byte().cpu().numpy()))
    if world_size > 1:
        dist.all_reduce(matrix.counts)
    return matrix.scores(), showcase.gather(shards, rank, world_size)


def summary(scores: Scores, shards: ShardSet) -> str:
    """The scores as a table and a line."""
    return (
        f"{scores.table(shards.label_set.classes)}\n\n"
        f"mIoU {scores.miou:.4f}   mAcc {scores.mean_accuracy:.4f}   aAcc {scores.pixel_accuracy:.4f}   "
        f"over {np.isfinite(scores.iou).sum()} classes that occur or are predicted in {len(shards)} images"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors of a training run")
    parser.add_argument("--data", required=True, help="shard folder or URL of one split")
    parser.add_argument("--output", type=Path, help="contact sheet PNG (default: beside the weights)")
    parser.add_argument("--batch-size", type=whole_number(1), default=4, metavar="N")
    parser.add_argument("--workers", type=whole_number(0), default=2, metavar="N")
    parser.add_argument("--pictures", type=whole_number(0), default=8, metavar="N", help="images on the contact sheet")
    parser.add_argument("--show", choices=("examples", "worst", "best"), default="examples", help="which images")
    args = parser.parse_args()
    shards = ShardSet.open(args.data)
    model, metadata = load_segmenter(args.weights)
    if "label_set" not in metadata:
        raise ModelError(f"{args.weights}: its metadata lacks label_set; give a .safetensors that training wrote")
    learnt, given = LabelSet.from_dict(metadata["label_set"]), shards.label_set
    if learnt.classes != given.classes:
        raise ModelError(
            f"{args.weights}: label_set: learnt the {learnt.num_classes} classes of {learnt.name}, but {args.data} has "
            f"the {given.num_classes} of {given.name}, by other names or in another order; name matching shards"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    scores, groups = evaluate(
        model, shards, model.image_size, device, args.batch_size, args.workers, args.pictures,
        metadata.get("keep_aspect", False),
    )  # fmt: skip
    print(summary(scores, shards))
    if groups[args.show]:
        output = args.output or args.weights.with_name(f"{args.weights.stem}_{Path(args.data).name}.png")
        save_png(output, sheet(groups[args.show], shards))
        print(f"contact sheet  {os.path.relpath(output)}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, ModelError, OSError) as error:
        sys.exit(f"error: {error}")
