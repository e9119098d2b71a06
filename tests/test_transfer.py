"""One try at a remote file: its bytes, or the reason why not, in good time and with no process left behind."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import webdataset  # noqa: F401  imported at the first transfer: not while a test looks at the clock

from data.transfer import TransferError, transfer
from tests.http_server import FolderServer

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FolderServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "file").write_bytes(CONTENT)
    with FolderServer(tmp_path / "remote") as server:
        yield server


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


def take(url: str, target: Path, timeout: float = 10, limit: int = 10**6) -> bytes:
    children = psutil.Process().children()
    file = os.open(target, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
    try:
        count, _ = transfer(url, file, limit, timeout)
    finally:
        os.close(file)
        assert psutil.Process().children() == children
    assert target.stat().st_size == count
    return target.read_bytes()


def refusal(url: str, target: Path, timeout: float = 10, final: bool = False) -> str:
    with pytest.raises(TransferError) as error:
        take(url, target, timeout)
    message = f"{error.value}; {error.value.remedy}"
    assert error.value.final == final and "\n" not in message
    return message


def test_takes_no_more_than_a_byte_above_the_limit(server, target):
    url = f"{server.url}/file"
    assert take(url, target) == CONTENT
    assert take(url, target, limit=len(CONTENT)) == CONTENT
    assert take(url, target, limit=9) == CONTENT[:10]
    assert take("pipe:yes", target, limit=10**5) == b"y\n" * 50_000 + b"y"


def test_a_first_byte_may_be_late_but_not_too_late(server, target):
    server.delay = 0.6
    assert take(f"{server.url}/file", target, timeout=2) == CONTENT
    assert "no byte for 0.3 s" in refusal(f"{server.url}/file", target, timeout=0.3)


def test_a_body_that_falls_silent_or_is_cut(server, target):
    server.stall_every, server.drop_every = 2, 3
    assert take(f"{server.url}/file", target) == CONTENT
    assert "no byte for 0.4 s" in refusal(f"{server.url}/file", target, timeout=0.4)
    assert "exit status 18 (connection cut)" in refusal(f"{server.url}/file", target)


def test_a_server_in_trouble_is_asked_again(server, target):
    server.answers = [503, 503]
    assert take(f"{server.url}/file", target) == CONTENT and len(server.requests) == 3
    server.answers = [503] * 9
    assert "5xx" in refusal(f"{server.url}/file", target, timeout=0.5)


def test_what_a_server_refuses_is_told_at_once(server, target):
    server.answers = [404, 403]
    start = time.monotonic()
    for _ in range(2):
        assert "401 not logged in, 403 forbidden, 404" in refusal(f"{server.url}/file", target, final=True)
    assert time.monotonic() - start < 2 and len(server.requests) == 2
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        assert "(no connection)" in refusal(f"http://127.0.0.1:{deaf.getsockname()[1]}/file", target)


def test_programs_that_are_missing(target, monkeypatch):
    monkeypatch.setenv("PATH", str(target))
    for url, program in (("http://127.0.0.1:1/x", "curl"), ("gs://b/x", "gsutil"), ("s3://b/x", "aws"), ("pipe:no", "command")):
        message = refusal(url, target, final=True)
        assert program in message and "install" in message
    assert "pipe:COMMAND" in refusal("abc://h/x", target, final=True)


def test_s3_through_its_own_program(target, tmp_path, monkeypatch):
    program = tmp_path / "aws"
    program.write_text('#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && printf "%s" "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert take("s3://bucket/a b.tar", target) == b"s3://bucket/a b.tar"


def test_commands_end_with_all_that_they_started(target):
    assert "exit status 3" in refusal("pipe:printf half; exit 3", target)
    sleep = ["sleep", f"30.{os.getpid()}"]
    for command in ("{} | cat", "{}", "exec >&-; {}", "(while true; do {}; done); true"):
        start = time.monotonic()
        assert "no byte" in refusal(f"pipe:{command.format(' '.join(sleep))}", target, timeout=0.3)
        assert time.monotonic() - start < 2
        assert sleep not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


def test_an_unknown_host_is_named_at_once(target, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "'no-such-host.invalid' is unknown" in refusal("http://no-such-host.invalid/x", target, final=False)
