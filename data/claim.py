"""The folder that a build writes into, and whose it is.

    OUT/.progress/    from a build's first moment to its last: while it is there, OUT is unfinished and no index stands
    OUT/.lock         held by who builds: by one build alone, or by any number of its parts together

Shards are made where nothing was, or in an unfinished build. The lock spares a second build a long work for nothing. No
content depends on it: some network file systems have none, or one for each machine only.
"""

import fcntl
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data import DataError
from data.shards import INDEX, Index

PROGRESS, LOCK = ".progress", ".lock"
SPLITS = ("train", "val")
OWN = re.compile(r"\.?(shard-\d{6}\.tar|samples\.npy|pixel_counts\.npy|index\.json)(\..+)?")


@contextmanager
def claim(out: Path, raw: Iterable[Path], alone: bool = True) -> Iterator[None]:
    """Makes OUT ready to be built into, be it new or an unfinished build's, and keeps other builds out of it meanwhile.

    Args:
        raw: the files to be packed.
        alone: false for a part of a build, beside which other parts may work.

    Raises:
        DataError: a finished build is there, another one is at work, or other files are where the shards go.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder with --out")
    if foreign := _foreign(out, raw):
        raise DataError(f"{min(foreign)}: lies where the shards go, but is of no unfinished build; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, alone):
        if is_built(out):  # asked with the lock in hand: another build may just have ended
            raise DataError(f"{out}: already built; delete it or choose another --out")
        (out / PROGRESS).mkdir(exist_ok=True)
        for name in SPLITS:
            (out / name / INDEX).unlink(missing_ok=True)
        yield


def remove_left_overs(folder: Path, index: Index | None) -> None:
    """Our own files that belong to no index: of killed builds, of one with other examples, of a split no longer made."""
    kept = {entry.file for entry in [*index.shards, *index.tables.values()]} if index else set()
    for path in folder.iterdir() if folder.is_dir() else []:
        if OWN.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    if index is None and folder.is_dir():
        folder.rmdir()


def is_built(out: Path) -> bool:
    """Whether a finished build is there."""
    return not (out / PROGRESS).exists() and any((out / name / INDEX).exists() for name in SPLITS)


def _foreign(out: Path, raw: Iterable[Path]) -> list[Path]:
    """What a build would overwrite or delete though no build of ours made it, and raw files among the shards."""
    folders = {(out / name).absolute() for name in SPLITS}
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    if (out / PROGRESS).exists() or is_built(out):  # else even names like ours are those of others
        found = [path for path in found if not OWN.fullmatch(path.name)]
    return found + [path for path in {path.parent.absolute() for path in raw} if folders & {path, *path.parents}]


@contextmanager
def _locked(out: Path, alone: bool) -> Iterator[None]:
    with (out / LOCK).open("a+") as file:  # NFS shares a lock only if the file is open for reading too
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another build is at work here; let it end, or choose another --out") from None
        except OSError as error:
            print(f"warning: {out}: cannot be locked ({error.strerror}); start no other build into it before this one ends")
        yield
