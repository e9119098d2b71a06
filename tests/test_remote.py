"""Remote files: whole or not there, whatever the network, the disk and the other processes do."""

import ctypes
import hashlib
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset  # noqa: F401  imported at the first download: not while a test looks at the clock

from data import DataError, remote
from data.remote import FileCache, file_url, is_remote
from tests.http_server import FolderServer

SIZE = 100_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FolderServer]:
    """Serves 40 files of SIZE bytes, f00 to f39."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.1)
    (tmp_path / "remote").mkdir()
    for i in range(40):
        (tmp_path / "remote" / f"f{i:02d}").write_bytes(np.random.default_rng(i).bytes(SIZE))
    with FolderServer(tmp_path / "remote") as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> FileCache:
    return FileCache(tmp_path / "cache", timeout=10)


def leftovers(cache: FileCache) -> list[Path]:
    return list(cache.folder.glob("partial/*"))


def fetch(cache: FileCache, server: FolderServer, i: int) -> Path:
    """File i, its content looked at."""
    content = np.random.default_rng(i).bytes(SIZE)
    while True:
        path = cache.fetch(f"{server.url}/f{i:02d}", SIZE, hashlib.sha256(content).hexdigest())
        try:
            assert path.read_bytes() == content
            return path
        except FileNotFoundError:  # deleted by another process, as may happen in a small cache
            pass


def refusal(cache: FileCache, url: str, *args: object) -> str:
    """What fetching is refused with: one line, and nothing of the file left."""
    with pytest.raises(DataError) as error:
        cache.fetch(url, *args)
    assert "\n" not in str(error.value) and not leftovers(cache)
    return str(error.value)


def started(function: Callable, *args: object) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def in_a_child(function: Callable[[], object]) -> object:
    """The function's result, from a process of its own."""
    said, answer = FORK.Pipe()
    process = started(lambda: answer.send(function()))
    assert said.poll(20)
    process.join()
    return said.recv()


def wait_for_bytes(cache: FileCache) -> None:
    """Until a download is under way."""
    deadline = time.monotonic() + 10
    while not any(any(path.read_bytes()[:9]) for path in leftovers(cache) if path.suffix == ".part"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_locations(cache, tmp_path):
    for location in ("http://h/x", "https://h/x", "s3://b", "gs://b/x", "hf://datasets/a/b", "pipe:cat x/{}"):
        assert is_remote(location)
    for location in ("/data/x", "x", "a:b", "C:/x", "file:///x", "./http:/x"):
        assert not is_remote(location)
    assert file_url("https://h/a/b/", "c d.tar") == "https://h/a/b/c%20d.tar"
    assert file_url("https://h/a?token=1", "c.tar") == "https://h/a/c.tar?token=1"
    assert file_url("s3://bucket/a", "c.tar") == "s3://bucket/a/c.tar"
    assert file_url("pipe:aws s3 cp s3://b/{} - | tee {}", "c d") == "pipe:aws s3 cp s3://b/'c d' - | tee 'c d'"
    with pytest.raises(DataError, match="pipe:cat x: .*{}"):
        file_url("pipe:cat x", "c.tar")
    (tmp_path / "a b.tar").write_bytes(b"content")
    assert cache.fetch(file_url(f"pipe:cat {tmp_path}/{{}}", "a b.tar"), 7).read_bytes() == b"content"


def test_one_connection_in_ten_cut(server, cache, caplog):
    server.drop_every = 10
    with caplog.at_level(logging.WARNING):
        paths = [fetch(cache, server, i) for i in range(40)]
    assert cache.retried == 4 == len(caplog.records) and len(server.requests) == 44
    assert "f09" in caplog.messages[0] and "connection cut" in caplog.messages[0]
    assert [fetch(pickle.loads(pickle.dumps(cache)), server, i) for i in range(40)] == paths
    assert len(server.requests) == 44 and not leftovers(cache)


def test_silence_is_given_up_try_by_try(server, cache):
    server.stall_every, cache.timeout, cache.retries = 1, 0.5, 1
    message = refusal(cache, f"{server.url}/f05", SIZE)
    assert "/f05: " in message and "try 2 of 2" in message and "no byte for 0.5 s" in message


def test_what_is_refused_is_told_at_once(server, cache):
    start = time.monotonic()
    message = refusal(cache, f"{server.url}/nowhere?key=secret", SIZE)
    assert time.monotonic() - start < 2 and len(server.requests) == 1
    assert f"{server.url}/nowhere: " in message and "secret" not in message
    cache.retries = 0
    assert "pipe:exit 3: not fetched, try 1 of 1: the command ended with exit status 3" in refusal(cache, "pipe:exit 3")


def test_nothing_of_a_failed_try_stays(cache, tmp_path):
    mark = tmp_path / "tried"
    url = f"pipe:test -e {mark} && printf new || {{ touch {mark}; printf longer; exit 1; }}"
    assert cache.fetch(url).read_bytes() == b"new" and cache.retried == 1


def test_a_file_that_differs_from_its_index(server, cache):
    for args in ((SIZE, "0" * 64), (None, "0" * 64), (SIZE - 1,), (SIZE + 1,)):
        server.requests.clear()
        message = refusal(cache, f"{server.url}/f00", *args)
        assert "/f00" in message and "differs from its index" in message and len(server.requests) == 2
    assert [path.name for path in cache.folder.iterdir()] == ["partial"]


def test_a_changed_file_is_not_taken_for_the_old_one(server, cache):
    for content in (b"first", b"second", b"third!"):
        (server.folder / "f00").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        for args in ((len(content), digest), (None, digest), ()):
            assert cache.fetch(f"{server.url}/f00", *args).read_bytes() == content
    server.requests.clear()
    cache.fetch(f"{server.url}/f00", 6)
    cache.fetch(f"{server.url}/f00", 6, digest)
    assert not server.requests


def test_the_least_recently_used_go_first(server, cache):
    cache.max_bytes = 3 * SIZE + SIZE // 2
    first, second, third = paths = [fetch(cache, server, i) for i in range(3)]
    others = cache.folder / "thesis.tex"
    others.write_text("no file of the cache")
    for age, path in zip((900, 700, 800, 999), [*paths, others], strict=True):
        os.utime(path, (time.time() - age,) * 2)
    fetch(cache, server, 0)
    fetch(cache, server, 3)
    assert first.exists() and second.exists() and not third.exists()
    fetch(cache, server, 4)
    assert first.exists() and not second.exists() and others.exists()
    fetch(cache, server, 2)
    assert not first.exists()
    (server.folder / "f05").write_bytes(bytes(2 * SIZE))
    cache.fetch(f"{server.url}/f05")
    assert sum(path.stat().st_size for path in cache.folder.glob("*-*")) <= cache.max_bytes
    cache.max_bytes = SIZE - 1
    for size in (SIZE, None):
        assert "may hold 99999;" in refusal(cache, f"{server.url}/f00", size)


def test_use_is_noted_once_a_minute(server, cache):
    path = fetch(cache, server, 0)
    for age, noted in ((30, False), (90, True)):
        os.utime(path, (time.time() - age,) * 2)
        fetch(cache, server, 0)
        assert (time.time() - path.stat().st_mtime < 20) == noted


def test_processes_share_one_download(server, cache):
    server.delay = 1
    processes = [started(fetch, cache, server, 0) for _ in range(4)]
    processes += [started(cache.fetch, f"{server.url}/f01") for _ in range(4)]  # of whatever content
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert sorted(server.requests) == ["f00", "f01"] and not leftovers(cache)


def test_the_bound_holds_while_processes_compete(server, cache):
    cache.max_bytes = 4 * SIZE

    def work(first: int) -> None:
        for i in range(20):
            fetch(cache, server, (first + 7 * i) % 20)

    fetch(cache, server, 0)
    processes, most = [started(work, first) for first in range(0, 20, 5)], 0
    while any(process.is_alive() for process in processes):
        with cache._lock("room"):  # else files come and go while they are counted
            paths = [*cache.folder.glob("partial/*.part"), *cache.folder.glob("*-*")]
            sizes = {status.st_ino: status.st_size for path in paths if (status := remote._status(path))}
        most = max(most, sum(sizes.values()))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 3 * SIZE <= most <= cache.max_bytes and not leftovers(cache)


def test_a_killed_download_leaves_nothing_behind(server, cache):
    server.stall_every = 1
    process = started(fetch, cache, server, 0)
    wait_for_bytes(cache)
    process.kill()
    process.join()
    assert leftovers(cache) and not list(cache.folder.glob("*f00"))
    server.stall_every = 0
    start = time.monotonic()
    fetch(cache, server, 0)
    assert time.monotonic() - start < 2 and not leftovers(cache)


def test_a_download_that_stands_still_is_passed_by(server, cache, monkeypatch):
    monkeypatch.setattr(remote, "MAX_PAUSE", 0.2)
    server.stall_every, cache.timeout = 1, 0.5
    process = started(fetch, cache, server, 0)
    wait_for_bytes(cache)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        server.stall_every = 0
        fetch(cache, server, 0)
        cache.max_bytes = SIZE + SIZE // 2
        with pytest.raises(DataError, match="downloads that stand still"):
            fetch(cache, server, 1)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0 and not leftovers(cache)


def test_a_full_disk(server, cache):
    """Of 256 KiB, in a namespace of its own, as most machines let an ordinary user make it."""

    def on_a_small_disk() -> tuple[int, str] | None:
        ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
        libc = ctypes.CDLL(None)
        cache.folder.mkdir()
        try:
            assert libc.unshare(0x10020000) == 0  # CLONE_NEWUSER | CLONE_NEWNS
            for name, content in ids.items():
                Path("/proc/self", name).write_text(content)
            assert libc.mount(b"tmpfs", bytes(cache.folder), b"tmpfs", 0, b"size=256k") == 0
        except (AssertionError, OSError):
            return None
        for i in range(3):
            fetch(cache, server, i)  # the disk bounds the cache before max_bytes does: the oldest goes
        return len(list(cache.folder.glob("*-*"))), refusal(cache, f"{server.url}/f03", 3 * SIZE)

    (server.folder / "f03").write_bytes(bytes(3 * SIZE))
    result = in_a_child(on_a_small_disk)
    if result is None:
        pytest.skip("no disk of its own for a user of this machine; the next test fails a write in another way")
    kept, message = result
    assert kept == 2
    for word in (str(cache.folder), "/f03", "No space left", "SAPIENS_SEG_CACHE"):
        assert word in message


def test_a_write_that_fails(server, cache):
    def with_small_files() -> list[str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        return [refusal(cache, f"{server.url}/f00", size) for size in (SIZE, None)]  # reserving it, writing it

    for message in in_a_child(with_small_files):
        assert str(cache.folder) in message and "File too large" in message and "SAPIENS_SEG_CACHE" in message
    assert not list(cache.folder.glob("*f00"))


def test_the_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SAPIENS_SEG_CACHE", str(tmp_path / "named"))
    path = fetch(FileCache(), server, 0)
    assert path.parent == tmp_path / "named"
    path.parent.chmod(0o500)
    assert fetch(FileCache(), server, 0) == path
    path.parent.chmod(0o700)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", Path("/proc/cache")):  # no one may write there, not even root
        message = refusal(FileCache(folder), f"{server.url}/f00", SIZE)
        assert f"{folder}: " in message and "data.cache" in message and "SAPIENS_SEG_CACHE" in message
    monkeypatch.delenv("SAPIENS_SEG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FileCache().folder == tmp_path / ".cache" / "sapiens-seg"
