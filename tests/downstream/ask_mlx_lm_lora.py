# /// script
# requires-python = ">=3.10"
# dependencies = ["mlx-lm-lora==5.10.2"]
# ///
"""mlx-lm-lora: --train --fuse in one process, then a prompt to the fused model."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx
import mlx_lm

model, question = sys.argv[1:]
# Its trainer asks for a figure that MLX knows on a GPU only.
info = mx.device_info
mx.device_info = lambda *device: {"max_recommended_working_set_size": 0, **info(*device)}
from mlx_lm_lora.train import main  # noqa: E402

data = Path("data")
data.mkdir()
chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
for name in ("train", "valid", "test"):
    (data / f"{name}.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
sizes = "--iters 2 --batch-size 1 --num-layers 2 --max-seq-length 128 --learning-rate 1e-9"
files = ["--model", model, "--data", "data", "--adapter-path", "fused"]
sys.argv[1:] = ["--train", "--fuse", "--train-mode", "sft", *files, *sizes.split()]
with redirect_stdout(sys.stderr):
    main()
mx.device_info = info
loaded, tokenizer = mlx_lm.load("fused")
prompt = tokenizer.apply_chat_template([chat[0]], add_generation_prompt=True)
print(mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=64))
