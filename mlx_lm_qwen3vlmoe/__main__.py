"""The command line: ``mlx-lm-qwen3vlmoe run | inspect | restore | doctor``."""

from __future__ import annotations

import argparse
import json
import runpy
import sys


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mlx-lm-qwen3vlmoe", description="Qwen3-VL-MoE as a text model in mlx-lm.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run an mlx_lm command with the plug-ins, whether or not .pth files run here")
    run.add_argument("subcommand", help="generate, chat, server, convert, lora, fuse, ...")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")

    doctor = commands.add_parser("doctor", help="tell whether plain mlx_lm commands reach this plug-in, and why not")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = commands.add_parser(
        "inspect", help="tell what a checkpoint is and takes in memory, from its headers alone"
    )
    inspect.add_argument("checkpoint", help="a folder, or a repository on the hub")
    inspect.add_argument("--ranks", type=_positive, default=1, help="machines to spread it over")
    inspect.add_argument(
        "--context", type=_positive, default=4096, help="tokens in the key-value cache (default: 4096)"
    )
    inspect.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="plan for mlx_lm.convert -q --q-bits BITS"
    )
    inspect.add_argument("--device", choices=("cpu", "gpu"), help="plan for this device (default: MLX's choice here)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with sizes in bytes")

    restore = commands.add_parser("restore", help="put tuned text back into the checkpoint that it came from")
    restore.add_argument("tuned", help="a folder that mlx_lm.fuse or mlx_lm.convert wrote")
    restore.add_argument("--original", required=True, help="the unquantized original: a folder, or a name on the hub")
    restore.add_argument("--save-path", required=True, help="a new folder, for all files of the original")

    parsed = parser.parse_args(arguments)
    if parsed.command == "run":
        from .registry import install

        install()
        sys.argv = ["mlx_lm", parsed.subcommand, *parsed.arguments]
        runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
    elif parsed.command == "doctor":
        from . import diagnosis

        report = diagnosis.diagnose()
        print(json.dumps(report, indent=2) if parsed.json else diagnosis.render(report))
        sys.exit(report["remedy"] is not None)
    elif parsed.command == "restore":
        from . import restoring
        from .errors import CheckpointError

        try:
            counts = restoring.restore(parsed.tuned, parsed.original, parsed.save_path)
        except (CheckpointError, OSError) as e:
            parser.exit(1, f"{e}\n")
        except KeyboardInterrupt:
            parser.exit(130, "Stopped: nothing is left of it.\n")
        print(f"{parsed.save_path}: {counts['text']} tensors of the tuned text, {counts['others']} of the original")
    else:
        from . import inspection
        from .errors import CheckpointError

        try:
            report = inspection.inspect(parsed.checkpoint, parsed.ranks, parsed.context, parsed.bits, parsed.device)
        except (CheckpointError, OSError) as e:
            parser.exit(1, f"{e}\n")
        print(json.dumps(report, indent=2) if parsed.json else inspection.render(report))
        sys.exit(report["error"] is not None)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return number


if __name__ == "__main__":
    main()
