"""Ask the tiny model a question, with this package and without: what `make demo` shows."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
from mlx_lm import load, stream_generate

MODEL = Path(__file__).parent / "tiny-qwen3-vl-moe"
WIDTH = 39  # of a column, on a terminal of 80


def answer(question: str) -> tuple[str, type]:
    """Print an answer as it comes, and its speed; returns it, and the class of the model."""
    model, tokenizer = load(str(MODEL))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    print(f"Question  {question}\nAnswer    ", end="", flush=True)
    text = ""
    for part in stream_generate(model, tokenizer, prompt, max_tokens=64):
        print(part.text, end="", flush=True)
        text += part.text
    device = "CPU" if mx.default_device() == mx.cpu else "GPU"
    print(f"\nSpeed     {part.generation_tokens} tokens, {part.generation_tps:.0f} a second on this {device}")
    return text, type(model)


def without(question: str) -> str:
    """The last word of the same command where every plug-in is off."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(MODEL), "--prompt", question]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MLX_LM_PLUGINS": "0"})
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


def side_by_side(left: list[str], right: list[str]) -> str:
    """Two columns of paragraphs."""
    wrap = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False).wrap
    columns = [[line for text in column for line in wrap(text)] for column in (left, right)]
    return "\n".join(
        f"{one:<{WIDTH}}  {other}".rstrip() for one, other in itertools.zip_longest(*columns, fillvalue="")
    )


def main() -> None:
    # A notice about the CPU's experts would stand in the middle of the answer.
    logging.getLogger("mlx_lm_qwen3vlmoe").setLevel(logging.ERROR)
    question = " ".join(sys.argv[1:]) or "What is this package?"
    text, served = answer(question)
    module = sys.modules[served.__module__]
    print(f"Served by {module.__name__}.{served.__name__}, from {os.path.relpath(module.__file__)}\n")
    ours = ["With this package", "-" * WIDTH, text.strip()]
    theirs = ["With MLX_LM_PLUGINS=0, that is, without", "-" * WIDTH, without(question)]
    print(side_by_side(ours, theirs))


if __name__ == "__main__":
    main()
