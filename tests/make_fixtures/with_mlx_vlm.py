"""mlx-vlm 0.7.10: its `convert`, in float and in 4 bits."""

import importlib.metadata
import shutil

import mlx_vlm.utils
from common import FIXTURES, WORK, fresh
from mlx_common import NoTokenizer, finish
from mlx_vlm.convert import convert

assert importlib.metadata.version("mlx-vlm") == "0.7.10"
mlx_vlm.utils.load_processor = lambda *args, **kwargs: NoTokenizer()

for name, source, how in (
    ("mlx_vlm", "official", {}),
    ("mlx_vlm_4bit", "official_b", {"quantize": True, "q_bits": 4, "q_group_size": 32}),
):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    # It reads every safetensors file of a folder, so the golden must not be among them.
    bare = fresh(source, WORK)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / source / file, bare)
    convert(str(bare), mlx_path=str(folder), **how)
    finish(folder)
