"""A server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from . import TINY


class Hub(BaseHTTPRequestHandler):
    """A hub that has the tiny model, and counts the bytes of tensors' files that it is asked for."""

    served = 0
    model = "some/model"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        path = self.path.split("?")[0]
        if self.model not in path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        files = [{"type": "file", "path": f.name, "rfilename": f.name, "size": 1, "oid": "0"} for f in TINY.iterdir()]
        if path.startswith("/api/models/"):
            answer = files if "/tree/" in path else {"id": self.model, "sha": "0" * 40, "siblings": files}
            return self.answer(json.dumps(answer).encode(), body)
        file = TINY / path.rpartition("/")[2]
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer(file.read_bytes(), body, file.suffix == ".safetensors")

    def answer(self, content: bytes, body: bool, count: bool = False) -> None:
        status, size, tag = 200, len(content), hashlib.sha256(content).hexdigest()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            status, content = 206, content[int(match[1]) : int(match[2]) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{size}")
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)
            Hub.served += len(content) * count

    def log_message(self, *arguments):
        pass


@contextmanager
def serving_hub(handler: type[Hub]) -> Iterator[dict[str, str]]:
    """The variables of a hub that can be reached for a while."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
    finally:
        server.shutdown()
        server.server_close()
