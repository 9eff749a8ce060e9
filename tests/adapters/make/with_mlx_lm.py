"""Adapters that real `mlx_lm.lora` trains, and what this package makes of them for PEFT; golden_of_mlx.py goes on."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
OFFICIAL = HERE.parents[1] / "fixtures" / "official"
BIN = Path(sys.executable).parent
WORDS = [f"w{number}" for number in range(96)]
DENSE = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

MADE = {  # fixture → type, layers, lora_parameters; without keys every linear layer has one
    "trained_lora": ("lora", 2, {"rank": 3, "scale": 5.0, "dropout": 0.0}),
    "trained_lora_head": (
        "lora",
        -1,
        {
            "rank": 2,
            "scale": 20.0,
            "dropout": 0.05,
            "keys": ["language_model.lm_head", "language_model.model.embed_tokens", "mlp.switch_mlp.up_proj"],
        },
    ),
    "trained_dora": ("dora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.1, "keys": ["self_attn.q_proj", *DENSE]}),
}


def model_with_a_tokenizer(folder):
    shutil.copytree(OFFICIAL, folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


with tempfile.TemporaryDirectory() as work:
    model = model_with_a_tokenizer(Path(work) / "model")
    for part in ("train", "valid"):
        lines = [" ".join(WORDS[3 + (start + step * k) % 80] for k in range(12)) for start, step in ((1, 7), (5, 11))]
        (Path(work) / f"{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for name, (kind, layers, parameters) in MADE.items():
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        (FIXTURES / name).mkdir(parents=True)
        settings, trained = Path(work) / f"{name}.json", Path(work) / name
        settings.write_text(json.dumps({"lora_parameters": parameters}))
        subprocess.run(
            (
                *(BIN / "mlx_lm.lora", "--train", "--model", model, "--data", work, "--fine-tune-type", kind),
                *("--num-layers", str(layers), "--config", settings, "--adapter-path", trained, "--seed", "1"),
                *("--iters", "20", "--batch-size", "2", "--learning-rate", "3e-2", "--val-batches", "1"),
            ),
            check=True,
        )
        (FIXTURES / name / "mlx").mkdir()
        shutil.copy(trained / "adapters.safetensors", FIXTURES / name / "mlx")
        config = json.loads((trained / "adapter_config.json").read_text())
        config["model"], config["adapter_path"], config["data"], config["config"] = "model", "adapters", "data", None
        (FIXTURES / name / "mlx" / "adapter_config.json").write_text(json.dumps(config, indent=4))
        subprocess.run(
            (
                *(BIN / "mlx-lm-qwen3vlmoe", "adapters", FIXTURES / name / "mlx"),
                *("--save-path", FIXTURES / name / "peft", "--model", OFFICIAL.name),  # which is no path of a machine
            ),
            cwd=OFFICIAL.parent,
            check=True,
        )
