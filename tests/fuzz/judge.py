"""One mutant through the host's own `load_model`, with the package in force, and what came of it."""

from __future__ import annotations

import functools
import logging
import re
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import mlx.core as mx
from checkpoints import documents, fixtures, original
from mlx_lm.utils import load_model
from mutations import mutant

from mlx_lm_qwen3vlmoe import CheckpointError, ModelArgs

TOLERANCE = 1e-3  # of the largest logit, in float32
RIGHT, REFUSED, UNNOTICEABLE, READERS, FAILED = "right", "refused", "unnoticeable", "reader's", "FAILED"
OUTCOMES = (RIGHT, REFUSED, UNNOTICEABLE, READERS, FAILED)

# What ends before the package is asked for anything: error, its message, why it is not ours to say.
READER = [
    ("RuntimeError", "", "MLX cannot read the file, or has no such type"),
    ("FileNotFoundError", "No safetensors found|config.json", "a file that the host opens is missing"),
    ("JSONDecodeError|UnicodeDecodeError", "", "the host reads config.json"),
    ("ValueError", "Model type .* not supported", "the host looks for model_type"),
    ("KeyError|TypeError|AttributeError", "", "the host looks into config.json for model_type and text_config"),
]
_asked = False


def _spy() -> None:
    """Notice when the host asks the package for the first time."""
    function = ModelArgs.from_dict.__func__

    def from_dict(cls, params):
        global _asked
        _asked = True
        return function(cls, params)

    ModelArgs.from_dict = classmethod(from_dict)


def prepare() -> None:
    """To be called once, in a process of its own."""
    logging.disable(logging.CRITICAL)
    mx.set_default_device(mx.cpu)
    _spy()


@functools.cache
def expected(name: str) -> tuple[mx.array, mx.array]:
    """Ids and logits of a fixture: the golden's, and then one of every token, by the model that gave the golden's."""
    golden = mx.load(str(fixtures()[name] / "golden.safetensors"))
    config = documents(name)["config.json"]
    special = [value for field, value in config.items() if field.endswith("_token_id")]
    others = [token for token in range(golden["logits"].shape[-1]) if token not in special]
    ids = mx.concatenate([golden["ids"], mx.array([others], golden["ids"].dtype)], axis=1)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        original(name).save(Path(folder))
        logits = _logits(Path(folder), ids)
    length = golden["ids"].shape[1]
    error = _error(logits[:, :length], golden["logits"])
    assert error < TOLERANCE / 10, f"{name}: without any change, the error is {error}"
    return ids, logits


def memory() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _logits(folder: Path, ids: mx.array) -> mx.array:
    model, _ = load_model(folder, lazy=True)
    model.set_dtype(mx.float32)
    logits = model(ids).astype(mx.float32)
    mx.eval(logits)
    return logits


def _error(found: mx.array, golden: mx.array) -> float:
    return (mx.abs(found - golden).max() / mx.abs(golden).max()).item()


def judge(identifier: str) -> tuple[str, str]:
    """Load a mutant: the outcome, and of a failure its cause, in words that other mutants share.

    Of two changes, the one that fails alone as well is the cause.
    """
    outcome = _judge(identifier)
    if outcome[0] == FAILED and len(mutant(identifier)[1]) > 1:
        alone = [_judge(identifier, n) for n in (0, 1)]
        return next((one for one in alone if one[0] == FAILED), outcome)
    return outcome


def _judge(identifier: str, only: int | None = None) -> tuple[str, str]:
    global _asked
    checkpoint, changes = mutant(identifier, only)
    ids, golden = expected(identifier.split(":")[0])
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        checkpoint.save(Path(folder))
        _asked = False
        try:
            found = _logits(Path(folder), ids)
        except CheckpointError as error:
            return REFUSED, str(error)
        except Exception as error:
            return _other(error)
    if found.shape == golden.shape and _error(found, golden) < TOLERANCE:
        return RIGHT, ""
    if excuse := next((change.excuse for change in changes if change.excuse), ""):
        return UNNOTICEABLE, excuse
    kinds = " + ".join(f"{change.kind.removesuffix(' everywhere')}, {_short(change.target)}" for change in changes)
    return FAILED, f"other numbers, without a word: {kinds}"


def _short(target: str) -> str:
    """The last word of a field or tensor: experts and attention are much the same."""
    home, _, last = target.rpartition(".")
    return f"…{'.experts' * (last in ('gate_up_proj', 'down_proj'))}.{last}" if home else last


def _other(error: Exception) -> tuple[str, str]:
    """Of an exception that is not the package's: the reader's, or a failure."""
    kind, message = type(error).__name__, str(error)
    if not _asked:
        for kinds, pattern, why in READER:
            if re.fullmatch(kinds, kind) and re.search(pattern, message):
                return READERS, why
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = re.sub(r"[\w.]*\.\w+[\w.]*|'[^']*'", "…", message.split("\n")[0])
    words = " ".join(re.sub(r"-?\d+(?:[.,] ?\d+)*", "N", words).split()[:8])
    return FAILED, f"{kind} in {Path(frame.filename).name}, {frame.name}: {words}"


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def explain(identifier: str) -> None:
    """Print what a mutant is and what came of it."""
    prepare()
    _, changes = mutant(identifier)
    for change in changes:
        print(change, f"(nobody could notice: {change.excuse})" if change.excuse else "")
    outcome, cause = judge(identifier)
    print(f"{outcome}: {cause}")
