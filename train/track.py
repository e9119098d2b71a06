"""What a run shows: the live line, metrics.jsonl, pictures, wandb. Nothing in here may end a run."""

import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.shards import ShardSet
from train.config import Config
from train.logs import log
from train.metrics import Scores
from train.showcase import Groups, write_validation

HURRY = 10.0  # seconds


class Tracker:
    """Rank 0's record of a run; on the other ranks there is none."""

    def __init__(self, config: Config, first_step: int, total_steps: int, about: dict[str, Any]) -> None:
        self.config, self.total_steps = config, total_steps
        self.metrics_path = config.output_dir / "metrics.jsonl"
        try:
            _drop_after(self.metrics_path, first_step)
        except OSError as error:
            log.warning("%s: steps that are done again stand there twice: %s", self.metrics_path, error)
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=None, mininterval=0.5, dynamic_ncols=True
        )  # disable=None: a bar on a terminal, plain lines elsewhere
        self.recent = deque([(time.monotonic(), first_step)], maxlen=50)
        self.dashboard = _start_dashboard(config, about)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of optimizer step `step`, which has just been done, and of the ones before it."""
        now, (then, from_step) = time.monotonic(), self.recent[0]
        self.recent.append((now, step + 1))
        rate = (step + 1 - from_step) / max(now - then, 1e-9)
        eta = _clock((self.total_steps - step - 1) / rate)
        text = f"loss {values['train/loss']:.4f}  lr {values['lr/highest']:.2e}  {values['speed/images_per_second']:.1f} images/s"
        if "speed/mfu" in values:
            text += f"  MFU {values['speed/mfu']:.1%}"
        if values["train/skipped_steps"]:
            text += f"  {values['train/skipped_steps']} steps passed over"
        self.bar.set_postfix_str(text, refresh=False)
        log.info("step %d/%d  %s  ETA %s", step + 1, self.total_steps, text, eta, extra={"on_bar": True})
        self._record(step + 1, values)

    def validation(self, step: int, scores: Scores, groups: Groups, shards: ShardSet, best: dict[str, float]) -> Path:
        """Record scores and pictures after `step` optimizer steps, and the best ones so far; the folder where they lie."""
        folder = self.config.output_dir / "validation" / f"step_{step:08d}"
        try:
            write_validation(folder, scores, groups, shards)
        except Exception as error:  # a disk that is full, a picture that cannot be drawn
            log.warning("step %d  validation not written: %s", step, error)
        classes = shards.label_set.classes
        per_class = {f"iou/{name}": iou for name, iou in zip(classes, scores.iou.tolist(), strict=True)}
        means = {"miou": scores.miou, "macc": scores.mean_accuracy, "aacc": scores.pixel_accuracy, **best}
        self._record(step, {f"val/{key}": value for key, value in means.items()} | per_class)
        if self.dashboard:
            self.dashboard.validation(self._axes(step), scores, groups, shards.label_set)
            self.dashboard.summary({f"best/{key.removeprefix('best_')}": value for key, value in best.items()})
        log.info("step %d  validation mIoU %.4f", step, scores.miou)
        return folder

    def finish(self, hurry: bool = False) -> None:
        """hurry: the run was asked to leave, and may be ended soon."""
        self.bar.close()
        if self.dashboard:
            seconds = self.config.wandb.finish_seconds
            self.dashboard.finish(min(seconds, HURRY) if hurry else seconds)

    def _axes(self, step: int) -> dict[str, int]:
        return {"step": step - 1, "samples": step * self.config.global_batch_size}

    def _record(self, steps_done: int, values: dict[str, float]) -> None:
        line = self._axes(steps_done) | {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s: not written: %s", self.metrics_path, error)
        if self.dashboard:
            self.dashboard.log(self._axes(steps_done) | values)


def _start_dashboard(config: Config, about: dict[str, Any]):
    if config.wandb.mode == "disabled":
        return None
    try:
        from train.dashboard import Dashboard  # not above: wandb takes a second

        return Dashboard(config, about)
    except Exception as error:  # it may be broken, or not be there
        log.warning("wandb cannot be used, and the run goes on without: %s", error)
        return None


def _drop_after(path: Path, step: int) -> None:
    """Forget lines of steps that the resumed run does again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) < step]
        beside = path.with_name(f".{path.name}")
        beside.write_text("".join(line + "\n" for line in kept))
        os.replace(beside, path)  # cut short in place, it would lose the whole run's record


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, written when the run was killed


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
