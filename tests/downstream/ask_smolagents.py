# /// script
# requires-python = ">=3.10"
# dependencies = ["smolagents==1.26.0"]
# ///
"""smolagents: its MLXModel, asked without an agent."""

import sys

from smolagents import MLXModel

model, question = sys.argv[1:]
message = {"role": "user", "content": [{"type": "text", "text": question}]}
print(MLXModel(model, max_tokens=64)([message]).content)
