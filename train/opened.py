"""An experiment's steps alone, without what else a run does, for train.benchmark and benchmarks.losses."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan
from data.remote import FileCache
from model.segmenter import Segmenter
from train.check import check
from train.clock import StepClock
from train.config import Config, training_order
from train.ema import Ema
from train.engine import Job, build_engine, join_job
from train.loop import train_step
from train.loss import PixelLoss, class_weights
from train.masters import Masters
from train.optim import lr_scales, set_lr
from train.peer import Plain
from train.run import build_model, prepare

Step = Callable[[list[Batch]], float]  # an optimizer step; returns its loss


@dataclass(frozen=True)
class Opened:
    """An experiment, as a run opens it, up to its model and its first batch."""

    config: Config
    settings: dict[str, Any]  # DeepSpeed's, resolved
    job: Job
    data: Mixture
    model: Segmenter
    class_weights: Tensor
    batches: Generator[list[Batch]]  # close it

    @classmethod
    def by(cls, config: Config, steps: int) -> "Opened":
        """With the batches of so many steps. Every process of the job must call it. Raises TrainError, DataError, ModelError."""
        job = join_job()
        data = Mixture.open(config.data.train, FileCache(config.data.cache, round(config.data.cache_gigabytes * 1e9)))
        settings = check(config, data, None, job.world_size, job.on_gpu)
        torch.manual_seed(config.seed)
        model = build_model(config, data.label_set.num_classes)
        weights = class_weights(config.loss.class_weights, data.pixel_counts, data.label_set)
        plan = BatchPlan(config.global_batch_size, config.micro_batch_size, job.rank, job.world_size)
        examples = TrainExamples(data, training_order(config, data), config.model.image_size, config.augment)
        batches = train_batches(examples, plan, 0, steps, config.data.workers, config.data.max_bad_fraction, job.on_gpu)
        return cls(config, settings, job, data, model, weights, batches)

    def step(self, side: str, clock: StepClock) -> Step:
        """An optimizer step of "ours" or of the "plain" peer, which has to be asked for first: ours takes the weights."""
        if side == "plain":
            return Plain(self.model, self.config, self.class_weights, self.data.label_set, clock, self.job).step
        return self._ours(clock)

    def _ours(self, clock: StepClock) -> Step:
        """What train.loop does in a step that is neither shown nor saved."""
        config = self.config
        prepare(self.model, config)
        scales = lr_scales(self.model, config.optimizer)
        engine = build_engine(self.model, config, self.settings)
        masters = Masters(engine, scales)
        ema = Ema(masters, config.ema.decay) if config.ema.decay is not None else None
        loss = PixelLoss(self.class_weights, self.data.label_set, config.loss.label_smoothing, config.loss.dice)
        engine.train()
        set_lr(engine.optimizer, config.optimizer.lr)

        def step(micro_batches: list[Batch]) -> float:
            value, _ = train_step(engine, micro_batches, loss, self.job, clock, per_class=False)
            engine.get_global_grad_norm()
            if ema:
                ema.update(step=0)
            return value

        return step
