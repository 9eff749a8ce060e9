# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["mlx-openai-server==1.6.3"]
# ///
"""mlx-openai-server: chat completions by `launch --model-type lm`."""

import sys

from serving import ask

model, question = sys.argv[1:]
ask(["mlx-openai-server", "launch", "--model-type", "lm", "--model-path", model, "--port", "PORT"], model, question)
