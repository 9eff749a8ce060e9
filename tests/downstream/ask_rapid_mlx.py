# /// script
# requires-python = ">=3.10"
# dependencies = ["rapid-mlx==0.16.10"]
# ///
"""rapid-mlx: chat completions with --no-mllm. Without, mlx-vlm serves a config with vision_config."""

import sys

from serving import ask

model, question = sys.argv[1:]
ask(["rapid-mlx", "serve", model, "--port", "PORT", "--no-mllm"], model, question)
