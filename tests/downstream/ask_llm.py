# /// script
# requires-python = ">=3.10"
# dependencies = ["llm==0.36", "llm-mlx==0.4"]
# ///
"""llm with llm-mlx: a prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

model, question = sys.argv[1:]
Path("llm-mlx.json").write_text(json.dumps({model: {"aliases": []}}))
options = ["-m", model, "-o", "temperature", "0", "-o", "max_tokens", "64", "--no-stream"]
subprocess.run(["llm", *options, question], env=os.environ | {"LLM_USER_PATH": str(Path.cwd())}, check=True)
