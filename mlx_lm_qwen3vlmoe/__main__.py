"""The command line, ``mlx-lm-qwen3vlmoe``: one function a subcommand, with its options and what it does."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .discovery.claims import NAME
from .errors import LARGEST, CheckpointError
from .terminal import printable, say, session

EXAMPLES = """\
examples:
  mlx-lm-qwen3vlmoe inspect Qwen/Qwen3-VL-30B-A3B-Instruct    does it load, and what does it take?
  mlx-lm-qwen3vlmoe doctor                                    do mlx_lm commands use this package here?
  mlx-lm-qwen3vlmoe run generate --model MODEL --prompt Hi    mlx_lm.generate, where start-up files do not run

exit status: 0 for yes, 1 for no, with the reason, 130 after Ctrl-C, 2 for a wrong command line
"""


def main(arguments: list[str] | None = None) -> None:
    with session():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Qwen3-VL-MoE as text models in mlx-lm. Once installed, mlx_lm commands need none of these.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = Path(__file__).parent
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__} from {where}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_inspect, _doctor, _run, _restore, _export, _adapters):
        add(commands)
    parsed = parser.parse_args(arguments)
    parsed.do(parsed)


def _add(commands: Any, name: str, what: str, example: str, status: str) -> argparse.ArgumentParser:
    """A subcommand, whose help ends with an example and its exit status."""
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {NAME} {example}\n\nexit status: {status}, 130 after Ctrl-C, 2 for a wrong command line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        "tell whether a checkpoint loads and what it takes in memory, from its headers alone",
        "inspect Qwen/Qwen3-VL-30B-A3B-Instruct --bits 4 --context 32768",
        "0 if it loads, 1 if it does not or cannot be read",
    )
    parser.add_argument("checkpoint", help="a folder, or a repository on the hub")
    parser.add_argument("--context", type=_positive, default=4096, help="tokens in the key-value cache (default: 4096)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="plan for mlx_lm.convert -q --q-bits BITS")
    parser.add_argument("--ranks", type=_positive, help="machines to spread it over")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="plan for this device (default: MLX's choice here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with sizes in bytes")

    def do(parsed: argparse.Namespace) -> None:
        _need_mlx_lm()
        from .inspection.report import inspect, render

        report = _or_one_sentence(inspect, parsed.checkpoint, parsed.ranks, parsed.context, parsed.bits, parsed.device)
        say(json.dumps(report, indent=2) if parsed.json else render(report))
        sys.exit(report["error"] is not None)

    parser.set_defaults(do=do)


def _doctor(commands: Any) -> None:
    parser = _add(
        commands,
        "doctor",
        "tell whether mlx_lm commands use this package here and, if not, what to do",
        "doctor --verbose",
        "0 for OK, 1 for NOT IN USE",
    )
    parser.add_argument(
        "type", nargs="?", default="qwen3_vl_moe", help="another model type, of any plug-in (default: qwen3_vl_moe)"
    )
    parser.add_argument("--verbose", action="store_true", help="print everything that the verdict comes from")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all of it")

    def do(parsed: argparse.Namespace) -> None:
        from .discovery import diagnosis

        report = diagnosis.diagnose(parsed.type)
        say(json.dumps(report, indent=2) if parsed.json else diagnosis.render(report, parsed.verbose))
        sys.exit(report["reason"] is not None)

    parser.set_defaults(do=do)


def _run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "run an mlx_lm command with this package, also where start-up files do not run",
        'run generate --model Qwen/Qwen3-VL-30B-A3B-Instruct --prompt "Hello"',
        "that of the mlx_lm command, 1 if there is no mlx-lm",
    )
    parser.add_argument("subcommand", help="generate, chat, server, convert, lora, fuse, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")

    def do(parsed: argparse.Namespace) -> None:
        from .discovery import claims

        claims.install()
        _need_mlx_lm()

        sys.argv = ["mlx_lm", parsed.subcommand, *parsed.arguments]
        try:
            runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
        except CheckpointError as e:
            sys.exit(printable(e))

    parser.set_defaults(do=do)


def _restore(commands: Any) -> None:
    parser = _add(
        commands,
        "restore",
        "put tuned text back into the checkpoint that it came from, vision tower and all",
        "restore fused --original Qwen/Qwen3-VL-30B-A3B-Instruct --save-path tuned",
        "0 if it is written, 1 if not, with the reason",
    )
    parser.add_argument("tuned", help="a folder that mlx_lm.fuse or mlx_lm.convert wrote")
    parser.add_argument("--original", required=True, help="the unquantized original: a folder, or a name on the hub")
    parser.add_argument("--save-path", required=True, help="a new folder, for all files of the original")

    def do(parsed: argparse.Namespace) -> None:
        _need_mlx_lm()
        from .restoring.restore import restore

        counts = _or_one_sentence(restore, parsed.tuned, parsed.original, parsed.save_path)
        done = f"{counts['text']} tensors from the tuned model, {counts['others']} from the original"
        say(printable(f"Wrote {parsed.save_path}: {done}"))

    parser.set_defaults(do=do)


def _export(commands: Any) -> None:
    parser = _add(
        commands,
        "export",
        "write the text model alone, as qwen3_moe, for tools that do not know Qwen3-VL-MoE",
        "export Qwen/Qwen3-VL-30B-A3B-Instruct --save-path text-model",
        "0 if it is written, 1 if not, with the reason",
    )
    parser.add_argument("checkpoint", help="a folder, or a repository on the hub")
    parser.add_argument("--save-path", required=True, help="a new folder for the text model")
    parser.add_argument("--dequantize", action="store_true", help="write floats, also of a quantized checkpoint")
    parser.add_argument(
        "--drop-yarn", action="store_true", help="leave YaRN out, for contexts within the original length"
    )

    def do(parsed: argparse.Namespace) -> None:
        _need_mlx_lm()
        from .exporting.export import export

        done = _or_one_sentence(export, parsed.checkpoint, parsed.save_path, parsed.dequantize, parsed.drop_yarn)
        say(printable(done))

    parser.set_defaults(do=do)


def _adapters(commands: Any) -> None:
    parser = _add(
        commands,
        "adapters",
        "convert LoRA and DoRA of PEFT to those of mlx_lm, or the reverse",
        "adapters peft-adapter --save-path adapters",
        "0 if they are converted, 1 if not, with the reason",
    )
    parser.add_argument("adapter", help="a folder, or a repository on the hub")
    parser.add_argument("--save-path", required=True, help="a new folder for the result")
    parser.add_argument("--model", help="the base model, if the adapter does not name it; its config alone is read")

    def do(parsed: argparse.Namespace) -> None:
        _need_mlx_lm()
        from .adapters import convert

        say(printable(_or_one_sentence(convert, parsed.adapter, parsed.save_path, parsed.model)))

    parser.set_defaults(do=do)


def _need_mlx_lm() -> None:
    """One line instead of a traceback."""
    from .discovery import diagnosis

    if why := diagnosis.why_no_host():
        sys.exit(printable(why))


def _or_one_sentence(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; where it fails on what the user has given, the command ends with one sentence."""
    try:
        return function(*arguments)
    except (CheckpointError, OSError) as e:
        sys.exit(printable(e))


def _positive(text: str) -> int:
    """A number that an axis of an array can have."""
    number = int(text) if text.isdecimal() and len(text) <= 10 else 0
    if not 0 < number <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST}, found {printable(text, 100)}")
    return number


if __name__ == "__main__":
    main()
