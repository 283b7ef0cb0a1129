"""Options that every table of this package takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch


def table_parser(
    description: str | None, splits: Sequence[str] = (), split: str | None = None
) -> argparse.ArgumentParser:
    """`--threads`, `--out`, and `--split` where there is a choice."""
    parser = argparse.ArgumentParser(description=description)
    if splits:
        parser.add_argument("--split", choices=splits, default=split)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options; torch has the threads from here on."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options
