"""Can the experiment be run? Asked before anything is allocated."""

from typing import Any

from data import DataError
from data.mixture import Mixture
from data.shards import ShardSet
from model import ModelError
from model.archs import get_arch
from model.weight_files import HUB, locate_weights, read_metadata
from train import TrainError, checkpoint, deepspeed_config
from train.config import Config, training_order
from train.loss import class_weights


def check(config: Config, train: Mixture, val: ShardSet | None, processes: int, on_gpu: bool) -> dict[str, Any]:
    """The resolved DeepSpeed settings, if the experiment fits itself, its shards and the number of processes.

    Raises TrainError, DataError, ModelError.
    """
    if val and not val.label_set.means_the_same(train.label_set):
        raise DataError(
            f"data.val: {config.data.val} has label set {val.label_set.name} with {val.label_set.num_classes} classes, "
            f"data.train has {train.label_set.name} with {train.label_set.num_classes}, or other names, pairs or ignored "
            "values; build both from one set"
        )
    arch = get_arch(config.model.arch)
    arch.check(config.model.image_size, arch.padding(config.model.patch_padding))
    class_weights(config.loss.class_weights, train.pixel_counts, train.label_set)
    if config.augment.background_class >= train.label_set.num_classes:
        raise TrainError(
            f"augment.background_class: {config.augment.background_class} is no class of {train.label_set.name}, which has "
            f"0..{train.label_set.num_classes - 1}"
        )
    checkpoint.sources(config.output_dir, config.resume_from)
    if config.load_from and not config.load_from.startswith(HUB):
        try:
            read_metadata(locate_weights(config.load_from))
        except ModelError as error:
            raise TrainError(f"load_from: {error}") from None
    total_steps = config.total_steps(training_order(config, train).epoch_length)
    if config.schedule.warmup_steps >= total_steps:
        raise TrainError(
            f"schedule.warmup_steps: {config.schedule.warmup_steps} is not below the run's {total_steps} steps; lower it"
        )
    return deepspeed_config.resolve(config, processes, on_gpu)
