"""A server in bad company: ``python tests/slow/soak.py [--minutes 10]``; the exit status is 1 after any failure.

The unchanged ``mlx_lm.server`` serves the tiny model to clients that ask what it was trained to answer, and in between
hang up, send oversized and malformed requests, images and placeholders of images. Every answer to a question is
compared word for word, after every abuse a plain question follows, and the memory may not grow once the server is warm.

Left out is what ends the generation thread, or the process, of mlx-lm 0.32.2 for models of its own as well: an empty
prompt, a list of strings as the prompt, a prompt that is exactly what its prompt cache holds (as a completion that is
continued after ``max_tokens``), ``stop`` that is not text, a ``top_k`` not below the vocabulary's size, ``logit_bias``
for a token outside of it, and a chat template in the request. So are requests without a stream for ever so many tokens:
they go on after their client has gone.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-qwen3-vl-moe"
QUESTIONS = json.loads((ROOT / "examples" / "tiny_questions.json").read_text())

CLIENTS = 5
CACHE_SEQUENCES, CACHE_BYTES = 12, 64_000_000  # of the server's prompt cache; it holds 2 KiB a token
MARGIN_BYTES = 32_000_000  # that memory may grow beyond the prompt cache, for fragments
LONG, ENDLESS = 2_500, 20_000  # tokens of long prompts: one a character
LONG_EVERY = 8  # seconds from one long prompt to the next, of all clients
LIMIT = 300  # seconds that one request may take
NEVER_ENDS = {"max_tokens": 10**9, "logit_bias": {"377": -100, "379": -100}}  # without the tokens that end an answer
PLACEHOLDERS = [f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")]
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"
NO_ANSWER = "no answer"  # where the host closes the connection


class FailureError(Exception):
    """What the server must not do."""


class Server:
    """An `mlx_lm.server` whose output is read as it comes: errors can be megabytes long."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.last: collections.deque[str] = collections.deque(maxlen=100)
        self.placeholders_logged = 0
        self.died = False
        self.process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("mlx_lm.server"), "--model", TINY, "--port", str(self.port)),
                *("--temp", "0", "--max-tokens", "64", "--prefill-step-size", "512"),
                *("--prompt-cache-size", str(CACHE_SEQUENCES), "--prompt-cache-bytes", str(CACHE_BYTES)),
            ],
            env={name: value for name, value in os.environ.items() if name not in ("MLX_LM_PLUGINS", "PYTHONPATH")}
            # Else glibc keeps what was freed in an arena for each thread: growth that would hide a leak.
            | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            text = line[:500].decode(errors="replace").rstrip()
            if " - INFO - " not in text and '" 200 -' not in text:
                self.last.append(text)
            self.placeholders_logged += " - ERROR - The prompt has placeholders of images" in text
            self.died |= "generation thread died" in text

    def check(self) -> None:
        if self.process.poll() is not None:
            raise FailureError(f"the server ended with status {self.process.returncode}")
        if self.died:
            raise FailureError("the server's generation thread died")

    def wait_until_it_listens(self) -> None:
        for _ in range(5 * LIMIT):
            self.check()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise FailureError("the server does not listen")

    def memory(self) -> int:
        """Its resident set in bytes."""
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
        return int(found.stdout.strip() or 0) * 1024

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Client:
    """One client, in a thread of its own: it deals itself all that it can do, in a random order, again and again."""

    long_lock = threading.Lock()
    long_next = 0.0
    long_answered = False

    def __init__(self, server: Server, number: int, stop: threading.Event):
        self.server = server
        self.random = random.Random(number)
        self.stop = stop
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.doing, self.since = "", time.monotonic()  # its present request and when that began
        self.slowest = 0.0
        self.api = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=LIMIT, max_retries=0
        )
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        good = [self.ask, self.ask, self.stream, self.stream, self.complete, self.ask_in_two_turns, self.ask_unbatched]
        bad = [
            *(self.cancel, self.cancel, self.hang_up, self.reset),
            *(self.long_prompt, self.big_body, self.malformed, self.malformed, self.malformed, self.broken_http),
            *(self.image, self.placeholder, self.placeholder_alone, self.unknown_model),
        ]
        while not self.stop.is_set():
            for action in self.random.sample(good + bad, len(good + bad)):
                if self.stop.is_set():
                    break
                self.do(action)
                if action in bad:
                    self.do(self.ask)

    def do(self, action: Callable[[], None]) -> None:
        self.since, self.doing = time.monotonic(), action.__name__
        try:
            action()
            took = time.monotonic() - self.since
            self.slowest = max(self.slowest, took)
            if took > LIMIT:
                raise FailureError(f"it took {took:.0f} s")
        except Exception as error:
            self.failures.append(f"{action.__name__}: {type(error).__name__}: {str(error)[:500]}")
            print(self.failures[-1], flush=True)
            self.stop.set()
        self.since = time.monotonic()

    def pair(self) -> tuple[list[dict[str, str]], str]:
        """A chat that asks a question, and its answer."""
        pair = self.random.choice(QUESTIONS)
        return [{"role": "user", "content": pair["question"]}], pair["answer"]

    def right(self, found: str | None, expected: str, reason: str | None) -> None:
        self.counts["answered"] += 1
        if found != expected or reason != "stop":
            raise FailureError(f"answered {found!r} ({reason}) instead of {expected!r}")
        self.counts["right"] += 1

    # What the server answers

    def ask(self, **extra: object) -> None:
        chat, expected = self.pair()
        choice = self.api.chat.completions.create(model=str(TINY), messages=chat, **extra).choices[0]
        self.right(choice.message.content, expected, choice.finish_reason)

    def ask_unbatched(self) -> None:
        """Requests with a seed are not batched."""
        self.ask(seed=self.random.randrange(1000))

    def stream(self) -> None:
        chat, expected = self.pair()
        with self.api.chat.completions.create(model=str(TINY), messages=chat, stream=True) as stream:
            choices = [chunk.choices[0] for chunk in stream]
        self.right("".join(choice.delta.content or "" for choice in choices), expected, choices[-1].finish_reason)

    def complete(self) -> None:
        chat, expected = self.pair()
        prompt = f"<|im_start|>user\n{chat[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        choice = self.api.completions.create(model=str(TINY), prompt=prompt).choices[0]
        self.right(choice.text, expected, choice.finish_reason)

    def ask_in_two_turns(self) -> None:
        """The second turn continues what is in the prompt cache."""
        first, second = QUESTIONS[0], QUESTIONS[5]
        chat = [{"role": "user", "content": first["question"]}, {"role": "assistant", "content": first["answer"]}]
        chat.append({"role": "user", "content": second["question"]})
        choice = self.api.chat.completions.create(model=str(TINY), messages=chat).choices[0]
        self.right(choice.message.content, second["answer"], choice.finish_reason)

    # Those that leave

    def cancel(self) -> None:
        """Close a stream that would go on for ever."""
        chat, _ = self.pair()
        with self.api.chat.completions.create(model=str(TINY), messages=chat, stream=True, **NEVER_ENDS) as stream:
            for _ in range(self.random.randint(1, 30)):
                next(stream)
        self.counts["canceled"] += 1

    def hang_up(self) -> None:
        """Close the connection before the answer, or before the end of the request."""
        chat, _ = self.pair()
        body = json.dumps({"messages": chat, "stream": self.random.random() < 0.5}).encode()
        whole = b"%sContent-Length: %d\r\n\r\n%s" % (POST, len(body), body)
        with socket.create_connection(("127.0.0.1", self.server.port), LIMIT) as connection:
            connection.sendall(whole[: self.random.choice([5, 60, len(whole) - 5, len(whole), len(whole)])])
            time.sleep(self.random.choice([0, 0.05, 0.3]))
        self.counts["dropped"] += 1

    def reset(self) -> None:
        """Reset the connection while the answer is streamed."""
        body = json.dumps({"messages": self.pair()[0], "stream": True} | NEVER_ENDS).encode()
        with socket.create_connection(("127.0.0.1", self.server.port), LIMIT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (POST, len(body), body))
            if not connection.recv(100).startswith(b"HTTP/1.0 200"):
                raise FailureError("no stream")
        self.counts["dropped"] += 1

    # Too much

    def long_prompt(self) -> None:
        """One that is answered, or one that nobody waits for: to read it would take a CPU minutes."""
        with Client.long_lock:
            if time.monotonic() < Client.long_next:
                return
            Client.long_next = time.monotonic() + LONG_EVERY
            Client.long_answered = answered = not Client.long_answered
        chat = [
            {"role": "user", "content": "".join(self.random.choices("0123456789", k=LONG if answered else ENDLESS))}
        ]
        if answered:
            reply = self.api.chat.completions.create(model=str(TINY), messages=chat, max_tokens=4)
            if reply.usage.prompt_tokens < LONG or not 1 <= reply.usage.completion_tokens <= 4:
                raise FailureError(f"the usage is {reply.usage}")
            self.counts["long"] += 1
            return
        with self.connection() as connection:
            self.send(connection, {"messages": chat, "stream": True} | NEVER_ENDS)
            response = connection.getresponse()
            for _ in range(self.random.randint(1, 4)):
                if response.status != 200 or b"keepalive" not in response.readline() + response.readline():
                    raise FailureError(f"{response.status} without progress")
        self.counts["long and canceled"] += 1

    def big_body(self) -> None:
        """Megabytes around a question, and megabytes that are no question."""
        padding = "x" * self.random.randint(2_000_000, 6_000_000)
        if self.random.random() < 0.5:
            self.ask(extra_body={"padding": padding})
        else:
            self.refused(padding, {400})
        self.counts["megabytes"] += 1

    # What the server refuses

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=LIMIT)
        try:
            yield connection
        finally:
            connection.close()

    def send(self, connection: http.client.HTTPConnection, body: object, path: str = "chat/completions") -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/v1/{path}", raw, {"Content-Type": "application/json"})

    def refused(self, body: object, statuses: set[int | str], path: str = "chat/completions") -> str:
        """What the server says about a request that it must refuse with one of these."""
        status, text = NO_ANSWER, ""
        with self.connection() as connection, suppress(ConnectionError, http.client.RemoteDisconnected):
            self.send(connection, body, path)
            response = connection.getresponse()
            status, text = response.status, response.read().decode()
        self.refusal(status, statuses, f"{path} {str(body)[:200]}", text)
        return text

    def refusal(self, status: int | str, statuses: set[int | str], what: str, text: str = "") -> None:
        if status not in statuses or "died" in text:
            raise FailureError(f"{what} was answered with {status} {text[:200]}")
        self.counts[f"refused: {status}"] += 1

    def malformed(self) -> None:
        """The body is not what it should be; the host closes the connection where its handler fails."""
        chat, _ = self.pair()
        base = {"messages": chat}
        bodies: list[tuple[object, int | str]] = [
            (b"", 400),
            (b"{", 400),
            (b"null", 400),
            (b"\xff\xfe{}", NO_ANSWER),
            (b"[" * 100_000, NO_ANSWER),
            ([base], 400),
            ({}, 400),
            ({"messages": None}, 400),
            ({"messages": "Who are you?"}, 400),
            ({"messages": [1]}, 400),
            ({"messages": []}, 404),
            ({"messages": [{"content": "Who are you?"}]}, 404),
            ({"messages": [{"role": "user", "content": 5}]}, 404),
            ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 404),
            (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 404),
            (base | {"tools": 5}, 404),
            (base | {"chat_template_kwargs": 5}, 404),
            (base | {"draft_model": []}, 404),
            (base | {"model": 5}, 400),
            (base | {"stream": "yes"}, 400),
            (base | {"max_tokens": 0}, 400),
            (base | {"max_tokens": "many"}, 400),
            (base | {"temperature": -1}, 400),
            (base | {"temperature": [0]}, 400),
            (base | {"top_p": 2}, 400),
            (base | {"top_k": 0.5}, 400),
            (base | {"logprobs": 1}, 400),
            (base | {"top_logprobs": 12}, 400),
            (base | {"logit_bias": {"a": 1}}, 400),
            (base | {"seed": "1"}, 400),
            (base | {"seed": -1}, NO_ANSWER),
        ]
        body, status = self.random.choice(bodies)
        self.refused(body, {status})
        prompt = self.random.choice([{}, {"prompt": None}, {"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": [1, 2, 3]}])
        self.refused(prompt, {400, 404}, "completions")
        self.refused(base, {404, NO_ANSWER}, "nowhere")  # which leaves the body unread: the connection may be reset

    def broken_http(self) -> None:
        """Wrong methods and headers, bodies shorter than they say, and what is not HTTP at all."""
        requests: list[tuple[bytes, int | str]] = [
            (b"GET /v1/chat/completions HTTP/1.1\r\n\r\n", 404),
            (b"PUT /v1/chat/completions HTTP/1.1\r\n\r\n", 501),
            (b"DELETE /v1/models HTTP/1.1\r\n\r\n", 501),
            (POST + b"\r\n", 411),
            (POST + b"Content-Length: many\r\n\r\n", 400),
            (POST + b"Content-Length: -1\r\n\r\n{", 400),
            (POST + b"Content-Length: 1000\r\n\r\n{", 400),
            (POST + b"Content-Length: 0\r\n\r\n", 400),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n\r\n", 411),
            (b"POST /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
            (POST + b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431),
            (b"GET / HTTP/9.9\r\n\r\n", 505),
            (bytes(range(128, 256)) + b"\r\n\r\n", 400),
        ]
        request, expected = self.random.choice(requests)
        answer = b""
        with socket.create_connection(("127.0.0.1", self.server.port), LIMIT) as connection, suppress(ConnectionError):
            connection.sendall(request)
            time.sleep(self.random.choice([0, 0.5]))
            connection.shutdown(socket.SHUT_WR)  # or it would wait for the rest of the body
            while part := connection.recv(65536):
                answer += part
        text = answer.decode(errors="replace")
        status: int | str = NO_ANSWER  # or lost, as an answer that leaves a part of the request unread may be
        if text.startswith("HTTP/"):
            status = int(text.split()[1])
        elif f"Error code: {expected}" in text:  # as before HTTP had a version
            status = expected
        self.refusal(status, {expected, NO_ANSWER}, str(request[:100]), text)

    def image(self) -> None:
        """Parts that are images, in the request or elsewhere."""
        url = self.random.choice(["data:image/png;base64,AAAA", "http://127.0.0.1:9/x.png", "file:///x.png"])
        content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        text = self.refused({"messages": [{"role": "user", "content": content}]}, {400, 404})
        if not url.startswith("http") and "text" not in text:
            raise FailureError(f"an image was refused with {text}")

    def placeholder(self) -> None:
        """A placeholder among other requests: it is answered, with an error in the log.

        The host batches nothing that it takes up before it has loaded its model again (see `unknown_model`): it is then
        refused, as in `placeholder_alone`.
        """
        chat, _ = self.pair()
        marker = f"{self.random.randrange(10**9)}"  # what is in the prompt cache is not looked at again
        chat[0]["content"] = f"{marker} {self.random.choice(PLACEHOLDERS)} {chat[0]['content']}"
        before = self.server.placeholders_logged
        try:
            if self.random.random() < 0.5:
                self.api.chat.completions.create(model=str(TINY), messages=chat)
            else:
                self.api.completions.create(model=str(TINY), prompt=chat[0]["content"])
        except openai.APIConnectionError:
            self.counts["placeholders not batched"] += 1
            return
        deadline = time.monotonic() + LIMIT
        while self.server.placeholders_logged == before:
            if time.monotonic() > deadline:
                raise FailureError("no error was logged")
            time.sleep(0.1)
        self.counts["placeholders"] += 1

    def placeholder_alone(self) -> None:
        """A placeholder in a request that is not batched: it fails by itself, and the host closes the connection."""
        content = f"{self.random.randrange(10**9)} {self.random.choice(PLACEHOLDERS)} What is it?"
        self.refused({"messages": [{"role": "user", "content": content}], "seed": 1}, {NO_ANSWER})

    def unknown_model(self) -> None:
        """The host drops its model before it looks for another one, and loads it again for the next request."""
        if self.random.random() < 0.3:
            self.refused({"messages": self.pair()[0], "model": "/nowhere"}, {404})


def soak(minutes: float) -> list[str]:
    """Run it; returns the failures."""
    server, stop = Server(), threading.Event()
    try:
        server.wait_until_it_listens()
        clients = [Client(server, number, stop) for number in range(CLIENTS)]
        clients[0].do(clients[0].ask)
        begun = time.monotonic()
        for client in clients:
            client.thread.start()
        failures, samples = watch(server, clients, stop, minutes * 60)
        for client in clients:
            client.thread.join(LIMIT + 10)
            if client.thread.is_alive():
                failures.append("a client is stuck")
            failures += client.failures
        if not failures:
            failures += last_questions(server)
        total = sum((client.counts for client in clients), collections.Counter())
        failures += memory(samples, begun, minutes * 60)
        if total["right"] != total["answered"]:
            failures.append("not all answers are right")
        print("; ".join(f"{total[name]} {name}" for name in sorted(total)))
        print(f"{total['answered']} questions answered, {total['right']} right; the slowest request took", end=" ")
        print(f"{max(client.slowest for client in clients):.0f} s")
        if failures:
            print("The end of the server's output:", *server.last, sep="\n  ")
        return failures
    finally:
        server.end()


def watch(
    server: Server, clients: list[Client], stop: threading.Event, seconds: float
) -> tuple[list[str], list[tuple[float, int]]]:
    """Sample the memory and print the progress until the time is up or something fails."""
    begun = time.monotonic()
    failures: list[str] = []
    samples: list[tuple[float, int]] = []
    shown = 0.0
    while not stop.wait(2):
        now = time.monotonic()
        samples.append((now, server.memory()))
        try:
            server.check()
        except FailureError as failure:
            failures.append(str(failure))
        failures += [
            f"{client.doing} takes more than {LIMIT} s" for client in clients if now - client.since > LIMIT + 10
        ]
        if failures or now - begun > seconds:
            stop.set()
        if now - shown > 30:
            shown = now
            done = sum((client.counts for client in clients), collections.Counter())
            refused = sum(count for name, count in done.items() if name.startswith("refused"))
            print(
                f"{now - begun:4.0f} s: {done['right']} right, {done['canceled']} canceled, {done['dropped']} dropped, "
                f"{refused} refused, {done['long']} long; {samples[-1][1] / 1e6:.0f} MB",
                flush=True,
            )
    return failures, samples


def last_questions(server: Server) -> list[str]:
    """After all that, every question once more."""
    client = Client(server, CLIENTS, threading.Event())
    for pair in QUESTIONS:
        client.pair = lambda pair=pair: ([{"role": "user", "content": pair["question"]}], pair["answer"])
        client.do(client.ask)
    return client.failures


def memory(samples: list[tuple[float, int]], begun: float, seconds: float) -> list[str]:
    """Compare the second with the last quarter of the time: the first one is to get warm in."""
    quarters: list[list[int]] = [[], [], [], []]
    for when, size in samples:
        quarters[min(3, int(4 * (when - begun) / seconds))].append(size)
    if not all(quarters):
        return ["too few samples of the memory"]
    middle = [statistics.median(quarter) / 1e6 for quarter in quarters]
    growth, allowed = middle[3] - middle[1], (CACHE_BYTES + MARGIN_BYTES) / 1e6
    print(f"memory: peak {max(size for _, size in samples) / 1e6:.0f} MB; medians of the quarters", end=" ")
    print(", ".join(f"{size:.0f}" for size in middle), f"MB; growth {growth:+.0f} MB, allowed {allowed:.0f} MB")
    return [f"the memory grew by {growth:.0f} MB"] if growth > allowed else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    failures = soak(minutes)
    print(f"FAILED: {'; '.join(failures)}" if failures else f"passed: {minutes:g} minutes, {CLIENTS} clients")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
