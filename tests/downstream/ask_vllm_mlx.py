# /// script
# requires-python = ">=3.10"
# dependencies = ["vllm-mlx==0.6.0"]
# ///
"""vllm-mlx: chat completions."""

import sys

from serving import ask

model, question = sys.argv[1:]
ask(["vllm-mlx", "serve", model, "--port", "PORT", "--offline"], model, question)
