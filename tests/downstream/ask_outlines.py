# /// script
# requires-python = ">=3.10"
# dependencies = ["outlines==1.3.3"]
# ///
"""outlines: free text, without a grammar."""

import sys

import mlx_lm
import outlines

model, question = sys.argv[1:]
print(outlines.from_mlxlm(*mlx_lm.load(model))(question, max_tokens=64))
