"""A `map` over processes that keeps order and bounds memory, and whose processes never outlive their parent."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Like `map`, in `workers` processes; one worker is this process itself.

    Few results wait at a time: where the consumer is slow, images must not pile up in memory.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = get_context("forkserver")  # forking this process would copy the locks that its threads hold
    context.set_forkserver_preload([getattr(function, "func", function).__module__])
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent alone stops the work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next item for ever.
    parent_process().join()
    os._exit(1)
