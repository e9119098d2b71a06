"""How a command ends for what its user can mend: the reason and the remedy in a line, and no traceback."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data import DataError
from model import ModelError
from train import TrainError
from train.logs import record_error


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends the process, with the reason and a remedy instead of a traceback, for what its user can mend."""
    try:
        yield
    except (TrainError, DataError, ModelError) as error:
        _leave(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error) or "of the CPU").splitlines()[0]
        _leave(
            f"out of memory ({first}); lower micro_batch_size (TRAIN_BATCH_SIZE_PER_GPU: the global batch stays), set "
            "model.recompute=blocks, or take a higher ZeRO stage or offload with deepspeed=ds_configs/..."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Also as CUDA's own libraries tell it, and torch of the CPU's."""
    told = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or told is not None


def _leave(message: str) -> None:
    record_error(message)
    rank = os.environ.get("RANK")
    text = f"error: {message}" if rank is None else f"error: rank {rank}: {message}"
    if torch.distributed.is_initialized():  # the others wait for this process, whose end would wait for threads and workers
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(text)
