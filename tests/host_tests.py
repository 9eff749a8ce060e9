"""Run mlx-lm's own model tests for this type against the plug-in: `python tests/host_tests.py`.

The tests come with the source archive of the installed mlx-lm, which pip fetches; they are not part of `make test`. On
the CPU their float16 half runs in float32, since MLX multiplies experts there in nothing else.
"""

import importlib
import sys
import tarfile
import tempfile
import unittest
from importlib.metadata import version
from pathlib import Path
from subprocess import run
from types import SimpleNamespace

import mlx.core as mx


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        source = f"mlx-lm=={version('mlx-lm')}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        run([*pip, "-d", temporary, source], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        sys.path.insert(0, str(next(Path(temporary).glob("*/tests"))))
        host = importlib.import_module("test_models")
        if mx.default_device() == mx.cpu:
            host.mx = SimpleNamespace(**{**vars(mx), "float16": mx.float32})

        def for_this_type_only(test):
            """`test_all_models` walks through configs of every type: the runner passes over the others."""
            runner = test.model_test_runner

            def run_if_ours(model, model_type, *arguments):
                if model_type == "qwen3_vl_moe":
                    ran.append(type(model).__module__)
                    runner(model, model_type, *arguments)

            test.model_test_runner = run_if_ours
            return test

        ran: list[str] = []
        suite = unittest.TestSuite(
            [for_this_type_only(host.TestModels("test_all_models")), host.TestVLSanitize("test_qwen3_vl_moe")]
        )
        result = unittest.TextTestRunner().run(suite)
    assert ran == ["mlx_lm_qwen3vlmoe.model"], ran
    return not result.wasSuccessful()


if __name__ == "__main__":
    sys.exit(main())
