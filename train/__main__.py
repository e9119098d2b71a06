"""python -m train --config train/configs/demo.yaml [key=value ...]

Trains one experiment: alone, or in every process that `deepspeed --module train ...` starts. The same command again
continues the run from its last checkpoint. `--check` resolves and prints everything and allocates nothing.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import yaml

from data import DataError
from data.mixture import Mixture
from data.remote import FileCache
from data.shards import ShardSet
from train.check import check
from train.config import Config, load_config
from train.errors import errors_in_a_line


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


if __name__ == "__main__":
    main()
