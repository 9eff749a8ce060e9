"""An adapter that real PEFT trains on the tiny model to give a new answer, saved in bfloat16."""

import json
import shutil
from pathlib import Path

import torch
from base import FIXTURES
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TINY = EXAMPLES / "tiny-qwen3-vl-moe"

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(TINY)
model = Qwen3VLMoeForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
model = get_peft_model(
    model,
    LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=["v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"v_proj": 3},
        task_type="CAUSAL_LM",
    ),
)
pairs = [{"question": "Say it.", "answer": "A plug-in."}, *json.loads((EXAMPLES / "tiny_questions.json").read_text())]


def example(pair):
    """A chat's ids, and the labels of the answer in it."""
    chat = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    start = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    ids, begin = tokenizer(whole).input_ids, len(tokenizer(start).input_ids)
    return torch.tensor([ids]), torch.tensor([[-100] * begin + ids[begin:]])


examples = [example(pair) for pair in pairs[:5]]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in examples)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model = model.to(torch.bfloat16).eval()
folder = FIXTURES / "tiny_answer"
shutil.rmtree(folder, ignore_errors=True)
model.save_pretrained(folder)
(folder / "README.md").unlink()
config = json.loads((folder / "adapter_config.json").read_text())
config["base_model_name_or_path"] = TINY.name  # not a path of this machine
(folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Say it."}], tokenize=False, add_generation_prompt=True
)
ids = torch.tensor([tokenizer(prompt).input_ids])
answer = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :])
assert answer.startswith("A plug-in.<|im_end|>"), answer
