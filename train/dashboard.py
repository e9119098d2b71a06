"""The run on wandb, from a thread of its own: nothing that wandb does can hold up a step, or end the run."""

import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import wandb

from data.labels import LabelSet
from train.config import Config
from train.logs import log
from train.metrics import Scores
from train.showcase import Groups, Judged

MAX_QUEUED = 1000  # calls, after which more are dropped: wandb does not answer
MAX_BEFORE_PICTURES = 50  # calls, after which pictures are, which take memory


class Dashboard:
    """One wandb run, the same one over all starts of an output folder. Every method returns at once, but `finish`."""

    def __init__(self, config: Config, about: dict[str, Any]) -> None:
        self.config, self.about = config, about
        self._calls: queue.Queue[Callable[[Any], None]] = queue.Queue(MAX_QUEUED)
        self._ended = threading.Event()
        self._dropped = self._failed = False  # told once
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float]) -> None:
        """One line of the history; it names its own `step` and `samples`."""
        self._put(lambda run: run.log(values))

    def summary(self, values: dict[str, float]) -> None:
        """What the run has come to."""
        self._put(lambda run: run.summary.update(values))

    def validation(self, axes: dict[str, int], scores: Scores, groups: Groups, label_set: LabelSet) -> None:
        """A table of the classes, the confusion matrix, and the images with masks that can be switched on and off."""
        shown = groups if self._calls.qsize() < MAX_BEFORE_PICTURES else {}
        self._put(lambda run: run.log({**axes, **_tables(scores, label_set), **_pictures(shown, label_set)}))

    def finish(self, seconds: float) -> None:
        """Send the rest, and wait so long for that."""
        self._ended.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("wandb does not answer: what it has not written is lost (wandb sync takes what it has)")
            for process in psutil.Process().children():  # else the interpreter waits for it at its end
                with suppress(psutil.Error):
                    if "wandb" in process.name():
                        process.kill()

    def _put(self, call: Callable[[Any], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._dropped:
                log.warning("wandb does not keep up: from here on it lacks some of the metrics; metrics.jsonl has them all")
            self._dropped = True

    def _work(self) -> None:
        run = self._harmless(self._start)
        while not (self._ended.is_set() and self._calls.empty()):
            try:
                call = self._calls.get(timeout=0.2)
            except queue.Empty:
                continue
            if run:
                self._harmless(lambda call=call: call(run))
        if run:
            self._harmless(run.finish)
        self._harmless(wandb.teardown)  # else it waits for its service at the interpreter's end, for ever if need be

    def _harmless(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException as error:  # a dashboard must never cost a night of training
            if not self._failed:
                log.warning("wandb failed, and will lack some of the run, which goes on: %s: %s", type(error).__name__, error)
            self._failed = True
            return None

    def _start(self) -> Any:
        config = self.config
        marker = config.output_dir / "wandb_run_id"
        run_id = (marker.read_text().strip() if marker.exists() else "") or secrets.token_hex(4)
        marker.write_text(run_id)
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            mode=config.wandb.mode,
            name=config.output_dir.name,
            id=run_id,
            resume="allow",
            dir=str(config.output_dir),
            config={**config.model_dump(mode="json"), **self.about},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        run.define_metric("step")
        run.define_metric("samples")
        run.define_metric("*", step_metric="step")
        return run


def _tables(scores: Scores, label_set: LabelSet) -> dict[str, Any]:
    share = scores.true / max(1, scores.true.sum())
    rows = zip(label_set.classes, scores.iou.tolist(), scores.accuracy.tolist(), share.tolist(), strict=True)
    names = label_set.classes
    cells = [[names[t], names[p], int(n)] for (t, p), n in np.ndenumerate(scores.confusion)]
    columns = ["Actual", "Predicted", "nPredictions"]
    return {
        "val/classes": wandb.Table(columns=["class", "IoU", "accuracy", "share of pixels"], data=[list(row) for row in rows]),
        "val/confusion": wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=columns, data=cells),
            {name: name for name in columns},
            {"title": "pixels"},
        ),
    }


def _pictures(groups: Groups, label_set: LabelSet) -> dict[str, Any]:
    names = dict(enumerate(label_set.classes)) | {label_set.ignore_index: "(ignored)"}

    def image(judged: Judged) -> wandb.Image:
        masks = {"prediction": judged.prediction, "truth": judged.truth}
        return wandb.Image(
            judged.photo,
            caption=judged.caption,
            masks={name: {"mask_data": mask, "class_labels": names} for name, mask in masks.items()},
        )

    return {f"val/{group}": [image(judged) for judged in images] for group, images in groups.items() if images}
