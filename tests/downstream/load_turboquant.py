# /// script
# requires-python = ">=3.10"
# dependencies = ["turboquant-mlx-full==0.30.0"]
# ///
"""turboquant-mlx-full: its `convert` to four bits, and its loader. To run what they make needs a GPU."""

import subprocess
import sys
from contextlib import redirect_stdout

from digest import digest
from turboquant_mlx.generate import load_turboquant

command = ["turboquant-convert", "--hf-path", sys.argv[1], "--mlx-path", "converted", "--bits", "4"]
subprocess.run(command, stdout=sys.stderr, check=True)
with redirect_stdout(sys.stderr):
    model = load_turboquant("converted", lazy=True)[0]
print(digest(model))
