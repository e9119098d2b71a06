"""One try at a remote file, through webdataset's `gopen`: http(s) by curl, gs by gsutil, hf, "pipe:COMMAND".

A process that falls silent is ended with all that it started; for one that fails, one line says why, and whether
another try makes sense.
"""

import hashlib
import os
import select
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

import psutil

CHUNK = 1 << 20
TRY_AGAIN = "check the network and the server, then run again"
# The commonest of curl's exit statuses; it is run without its own messages.
CURL = {7: "no connection", 18: "connection cut", 35: "no TLS", 56: "connection cut", 60: "bad TLS"}


class TransferError(Exception):
    """Why a try failed, in one line; `final` if others would fail alike."""

    def __init__(self, reason: str, remedy: str = TRY_AGAIN, final: bool = False) -> None:
        super().__init__(reason)
        self.remedy, self.final = remedy, final


def transfer(url: str, file: int, limit: int, timeout: float) -> tuple[int, str]:
    """Writes what is at `url` to the descriptor `file`, from its position on.

    Args:
        limit: one byte more than these is the most that is written, then the remote end is left.
        timeout: seconds without a byte after which the try is over.
    Returns:
        The number of bytes written and their sha256.
    Raises:
        TransferError: cannot be opened, fell silent, or ended with an error.
        OSError: `file` cannot be written.
    """
    _refuse_unknown_host(url)
    silence = TransferError(f"no byte for {timeout:g} s (the server is unknown, silent or answers with 5xx)")
    count, sha256 = 0, hashlib.sha256()
    with _opened(url) as process:
        ready = select.poll()  # not select.select, which fails for the descriptors above 1023 of a process with many
        ready.register(process.stdout, select.POLLIN)
        while count <= limit:
            if not ready.poll(1000 * timeout):
                raise silence
            chunk = os.read(process.stdout.fileno(), min(CHUNK, limit + 1 - count))
            if not chunk:
                break
            count += len(chunk)
            sha256.update(chunk)
            while chunk:
                chunk = chunk[os.write(file, chunk) :]
        else:
            return count, sha256.hexdigest()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise silence from None
    if process.returncode:
        raise _exit_error(url, process)
    return count, sha256.hexdigest()


def _refuse_unknown_host(url: str) -> None:
    # gopen's curl would look for it a minute long, and say nothing.
    if url.startswith(("http://", "https://")) and not getproxies():  # a proxy may know hosts that this machine does not
        host = urlsplit(url).hostname or ""
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise TransferError(f"the host {host!r} is unknown ({error.strerror})") from None


@contextmanager
def _opened(url: str) -> Iterator[subprocess.Popen]:
    """The process whose stdout is the content of `url`; at the end it is ended and reaped."""
    from webdataset.gopen import gopen  # imports torch: seconds, for each process that only uses local files

    try:
        pipe = gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)
    except Exception as error:  # hf: asks its server here already, and raises the errors of several libraries
        raise _open_error(error) from None
    try:
        yield pipe.proc
    finally:
        if pipe.proc.returncode is None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(pipe.proc.pid).children(recursive=True):  # a shell's would outlive it
                    child.kill()
            pipe.proc.kill()
            pipe.proc.wait()
        pipe.stream.close()


def _open_error(error: Exception) -> TransferError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        return TransferError(reason, f"install {error.filename} or add it to PATH", final=True)
    if isinstance(error, ImportError):
        return TransferError(reason, "install that package", final=True)
    if isinstance(error, ValueError):
        return TransferError(reason, "use another scheme, or pipe:COMMAND with {} for the file's name", final=True)
    return TransferError(reason)


def _exit_error(url: str, process: subprocess.Popen) -> TransferError:
    status, shell = process.returncode, isinstance(process.args, str)
    program = process.args.split()[0] if shell else process.args[0]
    reason = f"{'the command' if url.startswith('pipe:') else program} ended with exit status {status}"
    if shell and status in (126, 127):
        return TransferError(reason, "install the program that it names or add it to PATH", final=True)
    if not shell and program == "curl":
        if status == 22:  # where the answer may change (408, 429, 5xx), gopen's curl has tried on for a minute by now
            reason += ", the server refused (401 not logged in, 403 forbidden, 404 not found or the like)"
            return TransferError(reason, "check the URL and the right to read it", final=True)
        reason += f" ({CURL[status]})" if status in CURL else ""
    return TransferError(reason)
