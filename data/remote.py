"""Files from the network by way of a bounded folder of this machine, fetched once for all its processes.

    FOLDER/HASH-NAME        a whole file; its mtime is its last use, to the minute
    FOLDER/partial/*.part   a download under way, of its final size from the start, locked by who writes it
    FOLDER/partial/*.lock   held by who fetches that file

A file has its final name only once its content was checked. The locks spare double work and keep the bound; no content
depends on them, so that one whose holder stands still can be passed by.
"""

import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from urllib.parse import quote, urlsplit
from uuid import uuid4

from data import DataError
from data.transfer import TransferError, transfer

ENVIRONMENT = "SAPIENS_SEG_CACHE"
FIRST_PAUSE, MAX_PAUSE = 1.0, 30.0  # seconds between tries, trebled from one to the next: a restart is waited out
POLL = 0.05  # seconds between looks at what another process does
TOUCH_AFTER = 60  # seconds: noting every use would write to the disk at every read
CACHED = re.compile(r"[0-9a-f]{20}-")  # nothing else is deleted: the folder may by mistake be one with other files

log = logging.getLogger("data")


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a "pipe:" command, not a path. "file:" is neither: write the path."""
    return location.startswith("pipe:") or re.match(r"(?!file:)[a-z][a-z0-9+.-]+://", location) is not None


def file_url(location: str, name: str) -> str:
    """The URL of a file at a location such as "https://host/train", "s3://bucket/train", "pipe:ssh host cat train/{}".

    Raises:
        DataError: a "pipe:" without {}.
    """
    if location.startswith("pipe:"):
        if "{}" not in location:
            raise DataError(f"{location}: names no file; write {{}} where the file's name belongs")
        return location.replace("{}", shlex.quote(name))
    if location.startswith(("http://", "https://")):
        url = urlsplit(location)  # what follows a "?" may be an access token: it stays at the end
        return url._replace(path=f"{url.path.rstrip('/')}/{quote(name)}").geturl()
    return f"{location.rstrip('/')}/{name}"


class FileCache:
    """Remote files as local ones. It can be pickled; any number of processes and threads may share a folder.

    Args:
        folder: default $SAPIENS_SEG_CACHE, else ~/.cache/sapiens-seg.
        max_bytes: that the folder may hold, downloads under way included; a fuller disk bounds it further.
        timeout: seconds without a byte after which a try is over.
        retries: further tries after the first, with a growing pause before each.
    Attributes:
        retried: the further tries that this process needed so far.
    """

    def __init__(
        self, folder: Path | None = None, max_bytes: int = 50 * 10**9, timeout: float = 60, retries: int = 5
    ) -> None:
        self.folder = Path(folder or os.environ.get(ENVIRONMENT) or "~/.cache/sapiens-seg").expanduser().absolute()
        self.max_bytes, self.timeout, self.retries = max_bytes, timeout, retries
        self.retried = 0
        self._partial = self.folder / "partial"

    def fetch(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """A local copy of `url`, whole, of this size in bytes and this sha256 (hex).

        A copy from before is known by its name and size; its content is not read again. With neither size nor sha256
        nothing tells whether it is still the remote file, and it is fetched anew. Open the path at once: once the cache
        is full another process may delete it (which leaves an open file readable); then fetch again.

        Raises:
            DataError: not to be had in so many tries, not what was said, larger than the cache; no such program; or
                the folder cannot be written.
        """
        identity = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:20]
        readable = re.sub(r"[^\w.-]+", "_", _shown(url).removeprefix("pipe:"), flags=re.ASCII)[-60:]
        path = self.folder / f"{identity}-{readable}"
        try:
            before = _status(path)
            if before and (size is not None or sha256 is not None) and size in (None, before.st_size):
                if time.time() - before.st_mtime > TOUCH_AFTER:
                    with suppress(OSError):  # a folder that may only be read serves what it has
                        os.utime(path)
                return path
            self._refuse_size(url, size or 0)
            self._partial.mkdir(parents=True, exist_ok=True)
            with self._lock(path.name):
                now = _status(path)
                if not now or size not in (None, now.st_size) or before and os.path.samestat(before, now):
                    self._download(url, path, size, sha256)  # else another has, meanwhile
        except OSError as error:
            remedy = f"free space, or name a writable folder of this machine: data.cache in training, else {ENVIRONMENT}"
            raise DataError(f"{self.folder}: cannot hold {_shown(url)} ({error.strerror or error}); {remedy}") from None
        return path

    def _refuse_size(self, url: str, size: int) -> None:
        if size > self.max_bytes:
            raise DataError(f"{_shown(url)}: {size} bytes or more, its cache may hold {self.max_bytes}; allow more")

    def _download(self, url: str, path: Path, size: int | None, sha256: str | None) -> None:
        """Tries until the content is right, then gives it its final name."""
        tries, pause, wrong = self.retries + 1, FIRST_PAUSE, None
        with self._part(path.name, size or 0) as (part, file):
            for number in range(1, tries + 1):
                try:
                    os.lseek(file, 0, os.SEEK_SET)
                    count, digest = transfer(url, file, self.max_bytes if size is None else size, self.timeout)
                    self._refuse_size(url, count)
                    if size in (None, count) and sha256 in (None, digest):
                        break
                    failure = _difference(count, digest, size, sha256)
                    failure.final = digest == wrong  # the same twice is no accident of the network
                    wrong = digest
                except TransferError as error:
                    failure = error
                if failure.final or number == tries:
                    raise DataError(f"{_shown(url)}: not fetched, try {number} of {tries}: {failure}; {failure.remedy}")
                log.warning("%s: try %d of %d: %s", _shown(url), number, tries, failure)
                time.sleep(pause * SystemRandom().uniform(0.5, 1))  # `random` and its state belong to the training
                pause = min(3 * pause, MAX_PAUSE)
                self.retried += 1
            os.ftruncate(file, count)
            if size is None:
                with self._lock("room"):
                    self._make_room(0)  # counts this part with what it turned out to be
            os.replace(part, path)

    @contextmanager
    def _part(self, name: str, size: int) -> Iterator[tuple[Path, int]]:
        """Path and descriptor of a new file to download into, room made for it. At the end it is renamed or deleted."""
        part, patience = self._partial / f"{name}.{uuid4().hex}.part", self._patience("")
        while (file := self._reserve(part, size)) is None:
            if next(patience):
                held = f"downloads that stand still hold the {self.max_bytes} bytes allowed"
                raise DataError(f"{self.folder}: {held}; end their processes, or allow more")
            time.sleep(POLL)
        try:
            yield part, file
        finally:
            part.unlink(missing_ok=True)
            _release(file)

    def _reserve(self, part: Path, size: int) -> int | None:
        """The descriptor of a new, locked file of `size` bytes; None if others' downloads leave no room for it."""
        with self._lock("room"):
            self._remove_leftovers()
            if not self._make_room(size):
                return None
            file = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                os.ftruncate(file, size)  # empty blocks, but whoever makes room from now on counts them
            except OSError:
                part.unlink()
                _release(file)
                raise
            return file

    def _remove_leftovers(self) -> None:
        """Deletes the parts and locks of killed processes: those that nobody holds."""
        for path in [*self._partial.glob("*.part"), *self._partial.glob("*.lock")]:
            with suppress(FileNotFoundError, BlockingIOError):
                file = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(file)

    def _make_room(self, size: int) -> bool:
        """Deletes least recently used files until `size` more bytes fit; False if downloads take up that room."""
        busy = {path.stem for path in self._partial.glob("*.lock")}  # fetched, but not yet returned
        # Before the files: a part that is renamed meanwhile may be counted twice, but never not at all.
        parts = sum(status.st_size for path in self._partial.glob("*.part") if (status := _status(path)))
        files = [(path, _status(path)) for path in self.folder.iterdir() if CACHED.match(path.name)]
        files = sorted((status.st_mtime, status.st_size, path) for path, status in files if status)
        excess = parts + sum(length for _, length, _ in files) + size - self.max_bytes
        missing = size - shutil.disk_usage(self.folder).free
        for _, length, path in files:
            if max(excess, missing) <= 0:
                break
            if path.name not in busy:
                path.unlink(missing_ok=True)
                excess, missing = excess - length, missing - length
        return excess <= 0

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Keeps others with the same name out, but passes by a holder whose download has long stood still."""
        path, patience = self._partial / f"{name}.lock", self._patience(name)
        while True:
            file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (status := _status(path)) and os.path.samestat(status, os.fstat(file)):
                    break  # else its last holder has deleted it, and it keeps nobody out
            except BlockingIOError:
                if next(patience):
                    break
                time.sleep(POLL)
            os.close(file)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            _release(file)

    def _patience(self, name: str) -> Iterator[bool]:
        """At each `next`: whether no download whose name starts with `name` has grown for too long."""
        seen, since = None, time.monotonic()
        while True:
            parts = [(path, _status(path)) for path in sorted(self._partial.glob(f"{name}*.part"))]
            now = [(path, status.st_mtime_ns) for path, status in parts if status]
            if now != seen:
                seen, since = now, time.monotonic()
            yield time.monotonic() - since > self.timeout + 2 * MAX_PAUSE


def _difference(count: int, digest: str, size: int | None, sha256: str | None) -> TransferError:
    if size in (None, count):
        what = f"its sha256 is {digest}, not {sha256}"
    else:
        what = f"it has {count} bytes{' or more' if count > size else ''}, not {size}"  # reading stops at size + 1
    return TransferError(what, "the remote file differs from its index, upload the whole set again")


def _status(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()


def _release(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing frees it only once no forked process has a copy
    os.close(file)


def _shown(url: str) -> str:
    return url.split("?")[0] if url.startswith("http") else url  # access tokens stay out of logs and file names
