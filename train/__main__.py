"""python -m train --config train/configs/demo.yaml [key=value ...]

Trains one experiment: alone, or in every process that `deepspeed --module train ...` starts. The same command again
continues the run from its last checkpoint. `--check` resolves and prints everything and allocates nothing.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import yaml

from data import DataError
from data.shards import ShardSet
from model import ModelError
from train import TrainError
from train.config import Config, load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="print the resolved experiment and stop")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=1e-4")
    args = parser.parse_args()
    try:
        run(load_config(args.config, args.overrides), args.check)
    except (TrainError, DataError, ModelError) as error:
        rank = os.environ.get("RANK")
        sys.exit(f"error: {error}" if rank is None else f"error: rank {rank}: {error}")


def run(config: Config, check_only: bool) -> None:
    """Load, build, fit. Everything that can be wrong is told before the slow imports and the first allocation."""
    train = ShardSet.open(config.data.train)
    val = ShardSet.open(config.data.val) if config.data.val else None
    if val and val.label_set != train.label_set:
        raise DataError(
            f"data.val: {config.data.val} has label set {val.label_set.name} with {val.label_set.num_classes} classes, "
            f"{config.data.train} has {train.label_set.name} with {train.label_set.num_classes}; build both from one set"
        )
    # After the checks: importing torch and DeepSpeed takes seconds, and a misspelt key should be told at once.
    from train.run import check, start

    if check_only:
        settings = check(config, train, int(os.environ.get("WORLD_SIZE", "1")))
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False) + json.dumps(settings, indent=2))
    else:
        start(config, train, val)


if __name__ == "__main__":
    main()
