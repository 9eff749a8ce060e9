"""mlx-lm 0.32.2: its own `convert` (no plug-in), in float and in 4 bits."""

import importlib.metadata
import importlib.util
import shutil

import mlx_lm.utils
from common import FIXTURES, WORK
from mlx_common import NoTokenizer, finish
from mlx_lm.convert import convert

assert importlib.metadata.version("mlx-lm") == "0.32.2"
assert importlib.util.find_spec("mlx_lm_qwen3vlmoe") is None, "install mlx-lm alone here"
mlx_lm.utils.load_tokenizer = lambda *args, **kwargs: NoTokenizer()

for name, how in (
    ("mlx_lm_float", {}),
    ("mlx_lm_4bit", {"quantize": True, "q_bits": 4, "q_group_size": 32}),
):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    # The official config lacks the tie_word_embeddings that mlx-lm asks of text_config: a copy that has it.
    convert(str(WORK / "official_b_tie"), mlx_path=str(folder), **how)
    finish(folder)
