"""What `restore` writes, in the programs that read the whole model: transformers 4.57.6 and 5.23.0, and mlx-vlm.

Each is installed from PyPI: torch once, for both releases of transformers. And the memory that it takes at true shapes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import venv
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support import FIXTURES, TINY
from support.commands import run, write_chats
from support.hollow import MIDDLING, bf16, tensors, write, write_config
from support.tuned import converted, tuned

BIN = Path(sys.executable).parent
DOCUMENT = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
TOLERANCE = 1e-4  # of the largest logit, in float32
IN_TRANSFORMERS = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
folder, given, out = sys.argv[1:]
options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
assert not any(info.values()), info
given = load_file(given)
marks = given["with_image"] == model.config.image_token_id
more = {"mm_token_type_ids": marks.int()} if transformers.__version__ >= "5" else {}
more |= {"pixel_values": given["pixels"], "image_grid_thw": given["grid"].long()}
with torch.no_grad():
    text = model(input_ids=given["ids"].long()).logits
    image = model(input_ids=given["with_image"].long(), **more).logits
save_file({"text": text.contiguous(), "image": image.contiguous()}, out)
"""
IN_MLX_VLM = """
import sys, mlx.core as mx
from mlx_vlm.utils import load_model
from pathlib import Path
folder, given, out = sys.argv[1:]
model = load_model(Path(folder))
model.set_dtype(mx.float32)
given = mx.load(given)
text = model(given["ids"]).logits
image = model(given["with_image"], given["pixels"], image_grid_thw=given["grid"]).logits
mx.save_safetensors(out, {"text": text, "image": image})
"""
# On the CPU, MLX has no products of experts in 16 bits: the command of the document is for a GPU.
ANSWER = """
import sys, mlx.core as mx
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template
model, processor = load(sys.argv[1])
model.set_dtype(mx.float32)
prompt = apply_chat_template(processor, model.config, sys.argv[3], num_images=1)
print(generate(model, processor, prompt, [sys.argv[2]], max_tokens=64, temperature=0.0, verbose=False).text)
"""


@pytest.fixture(scope="module")
def mlx_vlm(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mlx_vlm") / "venv"
    venv.create(path, symlinks=True, with_pip=True)
    backend = [] if sys.platform == "darwin" else ["mlx[cpu]"]
    run(path / "bin" / "python", "-m", "pip", "-q", "install", "mlx-vlm==0.7.10", *backend, timeout=900)
    return path / "bin" / "python"


def given(original: Path, folder: Path) -> Path:
    """Ids, and ids with an image of four patches, for a model of any vocabulary."""
    config = json.loads((original / "config.json").read_text())
    image, start, end = (config[f"{name}_token_id"] for name in ("image", "vision_start", "vision_end"))
    vision = config["vision_config"]
    size = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    mx.random.seed(1)
    arrays = {
        "ids": mx.array([[5, 17, 40, 33, 60, 81, 20, 70, 12, 44, 45, 46]]),
        "with_image": mx.array([[5, 17, start, image, image, image, image, end, 40, 33]]),
        "pixels": mx.random.normal((16, size)),
        "grid": mx.array([[1, 4, 4]]),
    }
    mx.save_safetensors(str(folder / "given.safetensors"), arrays)
    return folder / "given.safetensors"


def restored(original: Path, folder: Path, name: str = "tuned") -> tuple[Path, mx.array]:
    """A restored checkpoint of tuned text, and the logits of that text in MLX."""
    made = tuned(original, folder / name) if name == "tuned" else converted(original, folder / name, lambda w: w * 2)
    arguments = (made, "--original", original, "--save-path", folder / "out")
    run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "restore", *arguments)
    model, _ = load_model(made)
    model.set_dtype(mx.float32)
    return folder / "out", model(mx.load(str(given(original, folder)))["ids"])


def error(found: mx.array, expected: mx.array) -> float:
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


READERS = {  # what each of them reads of the layouts
    "official": ("4.57.6", "5.23.0", "mlx-vlm"),
    "official_sharded": ("4.57.6", "5.23.0"),
    "resave_5_23_0": ("5.23.0",),
    "mlx_vlm": ("mlx-vlm",),
    "tied": ("4.57.6", "5.23.0"),
}


@pytest.mark.parametrize("name", READERS)
def test_all_who_read_the_original_give_the_logits_of_the_tuned_text_and_run_an_image(name, torch, mlx_vlm, tmp_path):
    original = tmp_path / "original"  # mlx-vlm loads all that ends in .safetensors
    shutil.copytree(FIXTURES / name, original, ignore=shutil.ignore_patterns("golden.safetensors"))
    out, expected = restored(original, tmp_path, "tuned" if name != "tied" else "doubled")
    images = {}
    for reader in READERS[name]:
        python, environment = torch.get(reader, (mlx_vlm, {}))
        code = IN_TRANSFORMERS if reader in torch else IN_MLX_VLM
        result = tmp_path / f"{reader}.safetensors"
        run(python, "-c", code, out, tmp_path / "given.safetensors", result, env=environment)
        logits = mx.load(str(result))
        assert error(logits["text"], expected) < TOLERANCE, reader
        images[reader] = logits["image"]
        result = tmp_path / f"{reader}-original.safetensors"
        run(python, "-c", code, original, tmp_path / "given.safetensors", result, env=environment)
        assert error(images[reader], mx.load(str(result))["image"]) > 0.1  # the text is another
    first, *others = images.values()
    assert all(error(other, first) < 1e-3 for other in others)  # and all see the same image


def test_a_model_that_was_tuned_for_real_answers_in_mlx_lm_and_about_an_image_in_mlx_vlm(
    torch, mlx_vlm, tmp_path, tiny_questions
):
    """Train, fuse, restore: the answer that was learned, through the whole model, as the document has it."""
    question, answer = "Say it.", "A plug-in."
    data = write_chats(tmp_path / "data", [{"question": question, "answer": answer}, *tiny_questions[:3]])
    training = ("--iters", 40, "--batch-size", 4, "--learning-rate", "2e-4", "--num-layers", -1, "--val-batches", 1)
    adapters = ("--adapter-path", tmp_path / "adapters")
    run(BIN / "mlx_lm.lora", "--model", TINY, "--train", "--data", data, *adapters, *training)
    run(BIN / "mlx_lm.fuse", "--model", TINY, *adapters, "--save-path", tmp_path / "fused")
    arguments = (tmp_path / "fused", "--original", TINY, "--save-path", tmp_path / "tuned")
    run(sys.executable, "-m", "mlx_lm_qwen3vlmoe", "restore", *arguments)
    arguments = ("--model", tmp_path / "tuned", "--prompt", question, "--temp", 0, "--max-tokens", 64)
    assert run(BIN / "mlx_lm.generate", *arguments).stdout.split("==========")[1].strip() == answer
    code = 'from PIL import Image; import sys; Image.new("RGB", (40, 32), (200, 30, 30)).save(sys.argv[1])'
    run(mlx_vlm, "-c", code, tmp_path / "picture.png")
    assert "mlx_vlm.generate --model tuned --image picture.png" in DOCUMENT
    assert (mlx_vlm.parent / "mlx_vlm.generate").exists()
    assert answer in run(mlx_vlm, "-c", ANSWER, tmp_path / "tuned", tmp_path / "picture.png", question).stdout
    (code,) = re.findall(r"(?s)```python\n(.*?)```", DOCUMENT)
    for python, environment in torch.values():
        run(python, "-c", code, cwd=tmp_path, env=environment)


MEASURE = """
import resource, sys
from mlx_lm_qwen3vlmoe.restoring.restore import restore
restore(*sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
BIG = MIDDLING | {"num_hidden_layers": 1, "vocab_size": 1024}


@pytest.mark.parametrize("per_expert", [False, True], ids=["fused", "per expert"])
def test_some_rows_of_a_layer_are_in_memory(per_expert, tmp_path):
    """Of a layer of 1.2 GB: half a gigabyte, of which a third is Python with MLX."""
    original, made = tmp_path / "original", tmp_path / "tuned"
    original.mkdir()
    made.mkdir()
    write_config(original, BIG)
    write_config(made, BIG)
    shapes = tensors(BIG, per_expert)
    write(original, bf16(shapes), holes=True)
    text = {}
    for name, shape in tensors(BIG).items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        if name.endswith("gate_up_proj"):
            e, h, both = shape
            for part in ("gate", "up"):
                text[name.replace("experts.gate_up_proj", f"switch_mlp.{part}_proj.weight")] = e, both // 2, h
        elif name.endswith("experts.down_proj"):
            text[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = shape[0], shape[2], shape[1]
        elif "visual" not in name:
            text[name] = shape
    write(made, bf16(text), holes=True)
    peak = int(run(sys.executable, "-c", MEASURE, made, original, tmp_path / "out").stdout)
    size = (original / "model.safetensors").stat().st_size
    assert os.path.getsize(tmp_path / "out" / "model.safetensors") == size > 1.2e9
    assert peak < 0.5e9, peak
