"""python -m train --config train/configs/demo.yaml [key=value ...]

Trains one experiment: alone, or in every process that `deepspeed --module train ...` starts. The same command again
continues the run from its last checkpoint. `--check` resolves and prints everything and allocates nothing.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from data import DataError
from data.mixture import Mixture
from data.remote import FileCache
from data.shards import ShardSet
from model import ModelError
from model.archs import get_arch
from model.weight_files import HUB, locate_weights, read_metadata
from train import TrainError, checkpoint, deepspeed_config
from train.config import Config, load_config, training_order
from train.logs import record_error
from train.loss import class_weights

# Also as CUDA's own libraries tell it.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|ALLOC_FAILED", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="print the resolved experiment and stop")
    parser.add_argument("--for-gpus", action="store_true", help="check for GPUs, also on a machine that has none")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-4")
    args = parser.parse_args()
    with errors_in_a_line():
        run(load_config(args.config, args.overrides), args.check, args.for_gpus)


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends the process, with the reason and a remedy instead of a traceback, for what its user can mend."""
    try:
        yield
    except (TrainError, DataError, ModelError) as error:
        _leave(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not OUT_OF_MEMORY.search(str(error)):
            raise
        first = (str(error) or "of the CPU").splitlines()[0]
        _leave(
            f"out of memory ({first}); lower micro_batch_size (TRAIN_BATCH_SIZE_PER_GPU: the global batch stays), set "
            "model.recompute=blocks, or take a higher ZeRO stage or offload with deepspeed=ds_configs/..."
        )


def _leave(message: str) -> None:
    record_error(message)
    rank = os.environ.get("RANK")
    text = f"error: {message}" if rank is None else f"error: rank {rank}: {message}"
    if torch.distributed.is_initialized():  # the others wait for this process, whose end would wait for threads and workers
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(text)


def run(config: Config, check_only: bool, for_gpus: bool = False) -> None:
    """Check, then train. Whatever can be wrong is told before the slow imports and the first allocation.

    for_gpus: as if there were GPUs here, as where a job is submitted there are none.
    """
    cache = FileCache(config.data.cache, round(config.data.cache_gigabytes * 1e9))
    train = Mixture.open(config.data.train, cache)
    try:
        val = ShardSet.open(config.data.val, cache) if config.data.val else None
    except DataError as error:
        raise DataError(f"data.val: {error}") from None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = check(config, train, val, processes, for_gpus or torch.cuda.is_available())
    if check_only:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False) + json.dumps(settings, indent=2))
        return
    # Not above: importing DeepSpeed and timm takes seconds, and a misspelt key should be told at once.
    from train.run import start

    start(config, settings, train, val)


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


if __name__ == "__main__":
    main()
