"""What a run says: on the console and in log.txt."""

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

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
