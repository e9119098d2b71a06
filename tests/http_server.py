"""A web server as bad as real ones can be: it serves a folder, and is slow, falls silent or breaks off as told."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FolderServer:
    """Serves `folder` on this machine while the `with` block runs; every attribute may be changed meanwhile.

    Attributes:
        url: without a slash at the end.
        requests: the names asked for, in order.
        answers: HTTP statuses to give, one a request, before files are served.
        drop_every: every so many-th answer with a file breaks off in mid-body; 0 for none.
        stall_every: every so many-th answer with a file falls silent in mid-body; 0 for none.
        delay: seconds before the first byte of an answer.
    """

    def __init__(self, folder: Path, drop_every: int = 0, stall_every: int = 0, delay: float = 0) -> None:
        self.folder, self.requests, self.answers = folder, [], []
        self.drop_every, self.stall_every, self.delay = drop_every, stall_every, delay
        self._served, self._lock, self._closing = 0, threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"folder_server": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FolderServer":
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = unquote(urlsplit(handler.path).path).strip("/")
        path = self.folder / name
        with self._lock:
            self.requests.append(name)
            status = self.answers.pop(0) if self.answers else 200 if path.is_file() else 404
            self._served += status == 200
            served = self._served
        self._closing.wait(self.delay)
        if status != 200:
            handler.send_error(status)
            return
        content = path.read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        drops, stalls = (every and served % every == 0 for every in (self.drop_every, self.stall_every))
        handler.wfile.write(content[: len(content) // 2] if drops or stalls else content)
        if stalls:
            self._closing.wait()


class _Handler(BaseHTTPRequestHandler):
    folder_server: FolderServer

    def do_GET(self) -> None:
        try:
            self.folder_server.answer(self)
        except OSError:
            pass  # the client left, as one does that was tired of waiting

    def log_message(self, *_: object) -> None:
        pass
