"""The validation images that are worth a look: the first ones, to be followed over the run, the worst and the best."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import DataError
from data.loader import decode
from data.pictures import contact_sheet, resized, save_png
from data.shards import ShardSet
from train.metrics import Scores

COLUMNS = ["photo", "truth", "prediction"]
SIDE = 512  # pixels of the longer side: on a GPU those of all ranks go through its memory


@dataclass(frozen=True)
class Judged:
    """An image and what the model made of it; miou is over the classes that its truth or prediction has, NaN if none."""

    index: int
    key: str
    miou: float
    photo: np.ndarray | None  # RGB uint8 (h, w, 3)
    truth: np.ndarray  # uint8 (h, w)
    prediction: np.ndarray  # uint8 (h, w)

    @property
    def caption(self) -> str:
        return f"{self.key}: mIoU {self.miou:.3f}"


Groups = dict[str, list[Judged]]  # "examples", "worst", "best"
Ranking = list[tuple[float, int]]  # mIoU and index


class Showcase:
    """Keeps `count` of each group, of those that this rank has scored."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: dict[int, Judged] = {}

    def wants(self, miou: float, index: int) -> bool:
        """Whether an image with this score would be kept."""
        return index in self._chosen([*self._ranking(), (miou, index)])

    def keep(self, judged: Judged) -> None:
        self.kept[judged.index] = judged
        self.kept = {i: self.kept[i] for i in self._chosen(self._ranking())}

    def gather(self, shards: ShardSet, rank: int, world_size: int) -> Groups:
        """Of all ranks, on rank 0, with their photos, none larger than SIDE; nothing on the others. All ranks must call it."""
        mine = self._ranking()
        rankings = [mine]
        if world_size > 1:  # first the scores alone: pictures of all of them would be many
            rankings = [[]] * world_size
            dist.all_gather_object(rankings, mine)
        groups = self._choose([entry for ranking in rankings for entry in ranking])
        wanted = {i for group in groups.values() for i in group if i in self.kept}
        pictures = {i: _ready_to_show(self.kept[i], shards) for i in wanted}
        parts: list | None = [pictures]
        if world_size > 1:
            parts = [None] * world_size if rank == 0 else None
            dist.gather_object(pictures, parts)
        found = {i: judged for part in parts or [] for i, judged in part.items()}
        return {name: [found[i] for i in group if i in found] for name, group in groups.items()}

    def _ranking(self) -> Ranking:
        return [(judged.miou, i) for i, judged in self.kept.items()]

    def _chosen(self, ranking: Ranking) -> set[int]:
        return {i for group in self._choose(ranking).values() for i in group}

    def _choose(self, ranking: Ranking) -> dict[str, list[int]]:
        ranked = sorted(entry for entry in ranking if math.isfinite(entry[0]))
        first = sorted(i for _, i in ranking if i < self.count)
        worst, best = ranked[: self.count], ranked[::-1][: self.count]
        return {"examples": first, "worst": [i for _, i in worst], "best": [i for _, i in best]}


def _ready_to_show(judged: Judged, shards: ShardSet) -> Judged:
    try:
        photo = decode(shards.read(judged.index))[0]
    except DataError:  # it could be read a moment ago; a run is worth more than a picture
        photo = np.full((*judged.truth.shape, 3), 128, np.uint8)
    small = {name: _at_most(picture) for name, picture in (("truth", judged.truth), ("prediction", judged.prediction))}
    return replace(judged, photo=_at_most(photo), **small)


def _at_most(picture: np.ndarray) -> np.ndarray:
    return resized(picture, SIDE) if max(picture.shape[:2]) > SIDE else picture


def sheet(judged: list[Judged], shards: ShardSet) -> np.ndarray:
    """RGB uint8 (h, w, 3)."""
    rows = [[one.photo, one.truth, one.prediction] for one in judged]
    return contact_sheet(rows, COLUMNS, shards.label_set, captions=[one.caption for one in judged])


def write_validation(folder: Path, scores: Scores, groups: Groups, shards: ShardSet) -> None:
    """A contact sheet of each group, and scores.json. Raises OSError naming what cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "classes": shards.label_set.classes,
        "colors": shards.label_set.colors,
        "confusion": scores.confusion.tolist(),
        "images": len(shards),
        **{name: [_told(one) for one in judged] for name, judged in groups.items()},
    }
    (folder / "scores.json").write_text(json.dumps(told))
    for name, judged in groups.items():
        if judged:
            save_png(folder / f"{name}.png", sheet(judged, shards))


def _told(judged: Judged) -> dict:
    return {"key": judged.key, "miou": judged.miou if math.isfinite(judged.miou) else None}
