# /// script
# requires-python = ">=3.11"
# dependencies = ["binade==0.1.1"]
# ///
"""binade: `pack` and its loader. To run what they make needs a GPU."""

import subprocess
import sys

from binade.mlx.loader import load
from digest import digest

subprocess.run(["binade", "pack", sys.argv[1], "--out", "packed"], stdout=sys.stderr, check=True)
print(digest(load("packed")[0]))
