# /// script
# requires-python = ">=3.12"
# dependencies = ["mlx-lm-lens==0.0.1"]
# ///
"""mlx-lm-lens: the likeliest token by the logits of its wrapper, again and again."""

import sys
from contextlib import redirect_stdout

import mlx.core as mx
from mlx_lm_lens.lens import open_lens

model, question = sys.argv[1:]
with redirect_stdout(sys.stderr):
    lens, tokenizer = open_lens(model)
ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
answer: list[int] = []
while len(answer) < 64 and not {*answer} & {*tokenizer.eos_token_ids}:
    logits = lens(mx.array([ids + answer]), return_dict=True)["logits"]
    answer.append(logits[0, -1].argmax().item())
print(tokenizer.decode(answer[:-1]))
