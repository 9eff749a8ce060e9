"""The command line: ``mlx-lm-qwen3vlmoe run <subcommand> …`` runs an mlx_lm command where start-up files do not run."""

from __future__ import annotations

import argparse
import runpy
import sys

from .registry import install


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mlx-lm-qwen3vlmoe", description="Qwen3-VL-MoE as a text model in mlx-lm.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run an mlx_lm command with the plug-ins, whether or not .pth files run here")
    run.add_argument("subcommand", help="generate, chat, server, convert, lora, fuse, ...")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    parsed = parser.parse_args(arguments)
    install()
    sys.argv = ["mlx_lm", parsed.subcommand, *parsed.arguments]
    runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
