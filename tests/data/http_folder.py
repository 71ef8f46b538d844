"""A folder over HTTP that can fail as servers do, for the tests of fetching."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Faults:
    """What the server does wrong, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.status: dict[str, list[int]] = {}
        """File -> status codes of its next answers."""
        self.cuts: dict[str, list[int]] = {}
        """File -> bytes after which its next answers are cut."""
        self.stalled: set[str] = set()
        """Files whose answers stay open behind the cut until the server ends."""
        self.end = threading.Event()
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """The URL of ``folder`` and the server's faults."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.split("?")[0].lstrip("/")
            with faults.lock:
                faults.asked[name] += 1
                status = faults.status.get(name) or [0]
                code = status.pop(0)
                cuts = faults.cuts.get(name)
                cut = cuts.pop(0) if cuts else None
            path = folder / name
            if code or not path.is_file():
                self.send_error(code or 404)
                return
            content, etag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = 0
            if asked and self.headers.get("If-Range") == etag:
                start = int(asked[1])
                faults.ranges.append(f"{name} {start}")
                self.send_response(206)
            else:
                self.send_response(200)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:cut])
            if name in faults.stalled:
                self.wfile.flush()
                faults.end.wait()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        faults.end.set()
        server.shutdown()
        thread.join()
        server.server_close()
