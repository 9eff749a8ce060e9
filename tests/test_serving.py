"""Tools and thoughts through a real `mlx_lm.server` and OpenAI's client: docs/serving.md, on the tiny model."""

from __future__ import annotations

import json
import re

import openai
import pytest
from support import BIN, HOST, ROOT, TINY
from support.checkpoints import thinking_model
from support.commands import UNCHANGED, run, serving

from mlx_lm_qwen3vlmoe.exporting.export import export

SPOKEN = json.loads((ROOT / "examples" / "tiny_dialogues.json").read_text())
TOOLS = SPOKEN["tools"]
DIALOGUES = {(each["messages"][0]["content"], each["thinking"]): each["messages"] for each in SPOKEN["dialogues"]}
EXPERTS, LAYERS = "How many experts have you?", "How many layers have you?"
BOTH = "How many experts and layers have you?"
CALLED = "tool_calls" if HOST >= (0, 30, 7) else "tool_call"  # a mistake of mlx-lm 0.30.2


def read_config(field: str) -> str:
    """The tool: it reads what the server does."""
    return str(json.loads((TINY / "config.json").read_text())["text_config"][field])


def calls(message: dict) -> list[tuple[str, dict]]:
    """Name and arguments of each call, of a reply or of a dialogue in examples/tiny_dialogues.json."""
    found = [call["function"] for call in message.get("tool_calls") or []]
    parsed = [(each["name"], each["arguments"]) for each in found]
    return [(name, json.loads(given) if isinstance(given, str) else given) for name, given in parsed]


class Chat:
    """A chat with a server, whole or streamed, that runs the tools which the model calls."""

    def __init__(self, url: str, stream: bool):
        self.client = openai.OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0)
        self.stream = stream
        self.messages: list[dict] = []
        self.chunks: list[dict] = []

    def reply(self, tools: list[dict] | None) -> tuple[dict, str]:
        """The next message of the model, and why it ended there."""
        options = {"tools": tools} if tools else {}
        made = self.client.chat.completions.create(
            model="default_model", messages=self.messages, stream=self.stream, max_tokens=200, **options
        )
        if not self.stream:
            return made.choices[0].message.model_dump(), made.choices[0].finish_reason
        choices = [chunk.choices[0] for chunk in made]
        self.chunks = [choice.delta.model_dump() for choice in choices]
        message = {"role": "assistant"}
        for key in ("reasoning", "content"):
            message[key] = "".join(chunk.get(key) or "" for chunk in self.chunks)
        message["tool_calls"] = [call for chunk in self.chunks for call in chunk.get("tool_calls") or []]
        return message, choices[-1].finish_reason

    def ask(self, question: str, tools: list[dict] | None = None) -> list[dict]:
        """The messages of the model up to its answer."""
        self.messages = [{"role": "user", "content": question}]
        found = []
        while True:
            message, reason = self.reply(tools)
            found.append(message)
            assert reason == (CALLED if message.get("tool_calls") else "stop")
            if not message.get("tool_calls"):
                return found
            kept = {key: message[key] for key in ("role", "content", "tool_calls")}
            self.messages.append(kept | {"reasoning_content": message.get("reasoning")})
            for call, (name, arguments) in zip(message["tool_calls"], calls(message), strict=True):
                assert name == "read_config"
                result = {"role": "tool", "tool_call_id": call["id"], "content": read_config(**arguments)}
                self.messages.append(result)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    with serving(TINY, tmp_path_factory.mktemp("instruct") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    with serving(thinking_model(folder / "model"), folder / "log") as url:
        yield url


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request) -> bool:
    return request.param


def assert_said(found: list[dict], question: str, thinks: bool) -> None:
    """The messages are word for word what was trained."""
    expected = [message for message in DIALOGUES[question, thinks] if message["role"] == "assistant"]
    assert [calls(message) for message in found] == [calls(message) for message in expected]
    assert [(message["content"] or "").strip() for message in found] == [each.get("content", "") for each in expected]
    thoughts = [(message.get("reasoning") or "").strip() for message in found]
    assert thoughts == [each.get("reasoning_content", "") for each in expected]


@pytest.mark.parametrize("question", [EXPERTS, LAYERS])
def test_a_tool_is_called_and_its_result_answered(instruct, stream, question):
    assert_said(Chat(instruct, stream).ask(question, TOOLS), question, False)


def test_two_tools_are_called_at_once(instruct, stream):
    assert_said(Chat(instruct, stream).ask(BOTH, TOOLS), BOTH, False)


def test_no_tool_is_called_where_none_is_needed(instruct, stream):
    assert_said(Chat(instruct, stream).ask("Who are you?", TOOLS), "Who are you?", False)


@pytest.mark.parametrize("question", ["Is the host changed?", "Does it need PyTorch?"])
def test_thoughts_are_apart_from_the_answer(thinking, stream, question):
    assert_said(Chat(thinking, stream).ask(question), question, True)


def test_thoughts_stream_before_the_answer(thinking):
    chat = Chat(thinking, stream=True)
    chat.ask("Is the host changed?")
    thought, said = ([bool(chunk.get(key)) for chunk in chat.chunks] for key in ("reasoning", "content"))
    assert sum(thought) > 10
    assert sum(said) > 10
    assert max(n for n, is_thought in enumerate(thought) if is_thought) < said.index(True) + 2


def test_a_thinking_model_calls_a_tool_and_goes_on_from_its_thought(thinking, stream):
    assert_said(Chat(thinking, stream).ask(EXPERTS, TOOLS), EXPERTS, True)


@pytest.mark.thorough
def test_an_exported_model_thinks_and_calls_a_tool_in_bare_mlx_lm(tmp_path):
    """In float32, as bare mlx-lm has no products of experts in 16 bits on the CPU."""
    arguments = ("--hf-path", thinking_model(tmp_path / "model"), "--mlx-path", tmp_path / "float32")
    run(BIN / "mlx_lm.convert", *arguments, "--dtype", "float32")
    export(str(tmp_path / "float32"), str(tmp_path / "text-model"))
    with serving(tmp_path / "text-model", tmp_path / "log", env=UNCHANGED) as url:
        assert_said(Chat(url, stream=False).ask(EXPERTS, TOOLS), EXPERTS, True)
        assert_said(Chat(url, stream=True).ask("Is the host changed?"), "Is the host changed?", True)


def test_arguments_of_a_template_come_with_a_request(instruct):
    """The tiny model's has a switch; Qwen's Instruct and Thinking checkpoints have a template each."""
    made = openai.OpenAI(base_url=instruct, api_key="none").chat.completions.create(
        model="default_model",
        messages=[{"role": "user", "content": "Does it need PyTorch?"}],
        max_tokens=200,
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    assert_said([made.choices[0].message.model_dump()], "Does it need PyTorch?", True)


def test_the_program_in_the_docs_calls_a_tool_and_prints_the_answer(instruct, tmp_path):
    text = (ROOT / "docs" / "serving.md").read_text()
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    address = "http://localhost:8080/v1"
    assert program.count(address) == 1
    (tmp_path / "program.py").write_text(program.replace(address, instruct))
    shown = run("python", "program.py", cwd=tmp_path, env={"PATH": f"{BIN}:/usr/bin:/bin"}).stdout
    assert shown == "read_config {'field': 'num_experts'}\nI have 6 experts in each layer.\n"
