"""One measurement, in a process of its own: ``python measure.py KIND CONTENDER ARGUMENT…`` prints one line of JSON."""

import io
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from checkpoints import Sizes, awq_tensors


def peak_rss(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(contender: str, folder: str):
    """A model and what makes its cache. Imports are not counted: they are the same for all of mlx-lm."""
    if contender == "mlx-vlm":
        from mlx_vlm.models.cache import make_prompt_cache
        from mlx_vlm.utils import load_model
    else:
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import _get_classes, load_model

        _get_classes(json.loads((Path(folder) / "config.json").read_text()))
    mx.reset_peak_memory()
    start = time.perf_counter()
    loaded = load_model(Path(folder))
    seconds = time.perf_counter() - start
    active = mx.get_active_memory()
    found = {
        "load": seconds,
        "peak_above_weights": mx.get_peak_memory() / active - 1,
        "rss_above_weights": peak_rss() / active - 1,
        "weights": active,
    }
    if contender == "mlx-vlm":
        text = loaded.language_model
        return (lambda ids, cache: text(ids, cache=cache).logits), lambda: make_prompt_cache(text), found
    model = loaded[0]
    where = sys.modules[type(model).__module__].__name__
    assert ("mlx_lm_qwen3vlmoe" in where) == (contender == "ours"), f"{contender} was served by {where}"
    return model, lambda: make_prompt_cache(model), found


def measure_load(contender: str, folder: str) -> dict:
    return load(contender, folder)[2]


def measure_tokens(contender: str, folder: str) -> dict:
    """Load, the resident peak of that, the first token, and the median of three more."""
    model, new_cache, found = load(contender, folder)
    found["rss"] = peak_rss()
    cache, token, times = new_cache(), mx.array([[7]]), []
    for _ in range(4):
        start = time.perf_counter()
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
        times.append(time.perf_counter() - start)
    return found | {"first_token": times[0], "token": statistics.median(times[1:])}


def measure_rates(contender: str, folder: str, length: str) -> dict:
    """Load, the first token after 1/16 of a prompt, then the rates of a whole prompt and of at most 32 tokens more."""
    model, new_cache, found = load(contender, folder)

    def step(ids: mx.array, cache) -> mx.array:
        token = mx.argmax(model(ids, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
        return token

    prompt = mx.random.randint(0, 4096, (1, int(length)), key=mx.random.key(0))
    start = time.perf_counter()
    try:
        step(prompt[:, : int(length) // 16], new_cache())
    except RuntimeError as error:
        if "only supports float32" not in str(error):
            raise
        return found  # MLX's CPU backend does not multiply experts in 16 bits: such a model loads, and does no more
    found["first_token"] = found["load"] + time.perf_counter() - start
    cache = new_cache()
    start = time.perf_counter()
    token = step(prompt, cache)
    found["prefill"] = prompt.size / (time.perf_counter() - start)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 32 and sum(times) < 4):
        start = time.perf_counter()
        token = step(token, cache)
        times.append(time.perf_counter() - start)
    return found | {"decode": 1 / statistics.median(times)}


def measure_lora(contender: str, folder: str, length: str) -> dict:
    """Steps of mlx_lm.lora's loss and default layers; the first one is not counted."""
    import mlx.nn as nn
    from mlx.optimizers import Adam
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _, _ = load(contender, folder)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()
    optimizer, step = Adam(1e-5), nn.value_and_grad(model, default_loss)
    batch = mx.random.randint(0, 4096, (1, int(length) + 1), key=mx.random.key(0))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        (loss, _), gradients = step(model, batch, mx.array([[0, int(length)]]))
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, loss)
        times.append(time.perf_counter() - start)
    return {"lora": 1 / min(times[1:])}


def measure_convert(contender: str, source: str, full: str) -> dict:
    """``mlx_lm.convert -q`` as a process of its own: all of its wall time, and its peak as a share of 16 bits."""
    with tempfile.TemporaryDirectory(dir=Path(source).parent) as folder:
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", f"{folder}/4bit", "-q"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    peak = peak_rss(resource.RUSAGE_CHILDREN)
    return {"convert": seconds, "peak": peak / 1e9, "peak_share": peak / int(full)}


def measure_sanitize(contender: str, experts: str, *layers: str) -> dict:
    """Shapes of Qwen3-VL-235B-A22B in AWQ; growth is a tensor's CPU time at the greatest size over the smallest."""
    from mlx_lm_qwen3vlmoe.model import Model, ModelArgs

    def sanitize(layers: int, experts: int) -> tuple[int, float, float, dict[str, mx.array]]:
        config, weights = awq_tensors(Sizes(layers, experts, hidden=4096, width=1536, heads=64))
        model = Model(ModelArgs.from_dict(config))
        start, cpu = time.perf_counter(), time.process_time()
        sanitized = model.sanitize(weights)
        return len(weights), time.perf_counter() - start, time.process_time() - cpu, sanitized

    def nodes(layers: int) -> tuple[int, int]:
        tensors, _, _, sanitized = sanitize(layers, 8)
        dot = io.StringIO()
        mx.export_to_dot(dot, *sanitized.values())
        return tensors, dot.getvalue().count("shape=rectangle")

    (few, few_nodes), (more, more_nodes) = nodes(1), nodes(2)
    times: dict[int, tuple[float, float]] = {}
    for n in [*layers, *layers]:  # the better of two
        tensors, seconds, cpu, _ = sanitize(int(n), int(experts))
        times[tensors] = min(times.get(tensors, (math.inf, math.inf)), (seconds, cpu / tensors))
    smallest, largest = min(times), max(times)
    return {
        "sanitize": times[smallest][0],
        "cpu": times[smallest][1] * smallest,
        "times": times,
        "growth": times[largest][1] / times[smallest][1],
        "nodes": (more_nodes - few_nodes) / (more - few),
    }


def measure_start(contender: str, bare: str, plugged: str, pairs: str) -> dict:
    """The difference of the medians of ``python -I -c pass`` in two environments, alternating."""
    times: dict[str, list[float]] = {bare: [], plugged: []}
    for _ in range(int(pairs)):
        for python, seconds in times.items():
            start = time.perf_counter()
            subprocess.run([python, "-I", "-c", "pass"], check=True)
            seconds.append(time.perf_counter() - start)
    without, with_plugin = (statistics.median(seconds) for seconds in times.values())
    return {"start": (with_plugin - without) * 1000, "start_without": without * 1000}


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    print(json.dumps(globals()[f"measure_{kind}"](*arguments)))
