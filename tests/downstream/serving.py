"""Asks a server one question, for the recipes of servers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

LIMIT = 240  # seconds to start and to answer


def ask(command: list[str], model: str, question: str, **options) -> None:
    """Start a server, where ``PORT`` in the command stands for a free port; print what it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Its output goes to stderr: stdout is the answer.
    server = subprocess.Popen([port if word == "PORT" else word for word in command], stdout=sys.stderr, **options)
    message = {"role": "user", "content": question}
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 64}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        print(_answer(request, server))
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _answer(request: urllib.request.Request, server: subprocess.Popen) -> str:
    end = time.monotonic() + LIMIT
    while (left := end - time.monotonic()) > 0:
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(request, timeout=left) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as e:
            if e.code != 503:  # as it is still loading the model
                raise RuntimeError(e.read().decode()) from e
        except urllib.error.URLError:
            pass  # it is still starting
        time.sleep(1)
    raise TimeoutError(request.full_url)
