"""Measures one block in this process and keeps the result: what `benchmarks.serving` runs for each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.results import keep

from .blocks import blocks_of, measure_here
from .settings import settings_of


def main() -> None:
    """Measures the block that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--folder", type=Path, required=True, help="for artefacts and logs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    settings = settings_of(is_quick=options.quick, rounds=options.rounds)
    block = blocks_of(settings)[options.name]
    result = measure_here(block, settings, options.folder)
    keep(options.out, result)


if __name__ == "__main__":
    main()
