"""What a run shows: console, log.txt, metrics.jsonl, wandb. Nothing in here may end a run."""

import json
import logging
import os
import secrets
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.config import Config

log = logging.getLogger("train")


def start_logging(output_dir: Path, rank: int) -> None:
    """Rank 0 to the console and to output_dir/log.txt; the others' warnings and every rank's crash to log.txt too."""
    output_dir.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    console, file = _Console(), logging.FileHandler(output_dir / "log.txt")
    file.handleError = lambda record: None  # of a full disk: else a traceback for each line
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(message)s"))
    log.handlers = [file] if rank else [console, file]
    logging.getLogger("DeepSpeed").addHandler(file)
    logging.getLogger("data").handlers = log.handlers  # bad samples, downloads tried again

    def crashed(kind: type[BaseException], error: BaseException, trace) -> None:
        file.emit(log.makeRecord(log.name, logging.ERROR, "", 0, "crashed", (), (kind, error, trace)))
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)  # at the end of the interpreter a collective may still be waited for

    sys.excepthook = crashed


def record_error(text: str) -> None:
    """Put a run's last words into its log.txt; the caller prints them."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(log.makeRecord(log.name, logging.ERROR, "", 0, "error: %s", (text,), None))


class _Console(logging.Handler):
    """Prints above a live progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "on_bar", False) and sys.stderr.isatty()):
            try:
                tqdm.write(self.format(record))
                sys.stdout.flush()
            except OSError:  # a file on a full disk, a pipe that nobody reads: log.txt has the rest
                sys.stdout = open(os.devnull, "w")


class Tracker:
    """Rank 0's record of a run; on the other ranks there is none."""

    def __init__(self, config: Config, first_step: int, total_steps: int, settings: dict) -> None:
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
        self.wandb = _start_wandb(config, settings)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of optimizer step `step`, which has just been done."""
        now, (then, from_step) = time.monotonic(), self.recent[0]
        self.recent.append((now, step + 1))
        rate = (step + 1 - from_step) / max(now - then, 1e-9)
        values["images_per_second"] = rate * self.config.global_batch_size
        eta = _clock((self.total_steps - step - 1) / rate)
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['images_per_second']:.1f} images/s"
        if values["skipped_steps"]:
            text += f"  {values['skipped_steps']} steps passed over"
        self.bar.set_postfix_str(text, refresh=False)
        log.info("step %d/%d  %s  ETA %s", step + 1, self.total_steps, text, eta, extra={"on_bar": True})
        self._record(step, {f"train/{key}": value for key, value in values.items()})

    def validation(self, step: int, values: dict[str, float], sheet: np.ndarray | None) -> None:
        """Record scores (and the contact sheet, RGB uint8) after `step` optimizer steps."""
        values = {f"val/{key}": value for key, value in values.items()}
        self._record(step - 1, values)
        if sheet is not None and self.wandb is not None:
            self._wandb_log({"val/examples": sheet}, step - 1)

    def finish(self) -> None:
        self.bar.close()
        if self.wandb is not None:
            _harmless("wandb.finish", self.wandb.finish)

    def _record(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **{key: _json_number(value) for key, value in values.items()}}
        try:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s: not written: %s", self.metrics_path, error)
        self._wandb_log(values, step)

    def _wandb_log(self, values: dict, step: int) -> None:
        if self.wandb is None:
            return

        def send() -> None:
            import wandb

            pictures = {k: wandb.Image(v) for k, v in values.items() if isinstance(v, np.ndarray)}
            self.wandb.log({"step": step, **values, **pictures})

        _harmless("wandb.log", send)


def _start_wandb(config: Config, settings: dict):
    if config.wandb.mode == "disabled":
        return None

    def start():
        import wandb

        marker = config.output_dir / "wandb_run_id"  # a resumed run goes on in the same wandb run
        run_id = marker.read_text().strip() if marker.exists() else secrets.token_hex(4)
        marker.write_text(run_id)
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            mode=config.wandb.mode,
            name=config.output_dir.name,
            id=run_id,
            resume="allow",
            dir=str(config.output_dir),
            config={**config.model_dump(mode="json"), "deepspeed_settings": settings},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        run.define_metric("*", step_metric="step")
        return run

    return _harmless("wandb.init", start)


def _harmless(what: str, action):
    """Run a tracker's call; its failure is told, not passed on."""
    try:
        return action()
    except Exception as error:  # a dashboard must never cost a night of training
        log.warning("%s failed and is passed over: %s", what, error)
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


def _json_number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
