# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx-knife==2.0.8"]
# ///
"""mlx-knife: chat completions by what `mlxk serve` starts, in a session of its own that may outlive it."""

import os
import shutil
import sys
from pathlib import Path

from serving import ask

model, question = sys.argv[1:]
# A cache of the hub as a download leaves it: the server takes models from there.
repository = Path("hub", "models--mlx-community--tiny")
shutil.copytree(model, repository / "snapshots" / ("0" * 40))
(repository / "refs").mkdir()
(repository / "refs" / "main").write_text("0" * 40)
command = [sys.executable, "-m", "uvicorn", "mlxk2.core.server_base:app", "--port", "PORT"]
ask(command, "mlx-community/tiny", question, env=os.environ | {"HF_HOME": str(Path.cwd())})
