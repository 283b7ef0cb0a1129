"""Measures what experts cost while serving: `make bench`, or `make bench-serving-quick`.

    python -m benchmarks.serving                                     all, docs/results/serving.{json,md},
                                                                     serving-float32 without AVX-512
    python -m benchmarks.serving --blocks switch-150m,offline-150m   these, beside what is kept of others
    python -m benchmarks.serving --list                              names of the blocks

Results of blocks are kept in `build/serving` until settings or sources change, so a run can be interrupted.
The page is written after each block.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from alter_core.errors import EvaluationError

from .blocks import Block, BlockCache, blocks_of, measure_apart
from .report import write_report
from .settings import FULL, BenchSettings, settings_of

FOLDER = Path("build/serving")


def main() -> int:
    """Measures the blocks one after another; the exit status is 1 if one could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--blocks", help="names, separated by commas; by default all")
    parser.add_argument(
        "--rounds", type=int, help=f"by start of the engines, {FULL.rounds} by default"
    )
    parser.add_argument("--list", action="store_true", help="name the blocks and stop")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, written to build/"
    )
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: at least 1 is wanted, {options.rounds} was given")
    settings = settings_of(is_quick=options.quick, rounds=options.rounds)
    blocks = blocks_of(settings)
    if options.list:
        print("\n".join(blocks))
        return 0
    chosen = options.blocks.split(",") if options.blocks else list(blocks)
    if unknown := [name for name in chosen if name not in blocks]:
        parser.error(f"no such block: {', '.join(unknown)}; there are: {', '.join(blocks)}")
    out = Path("build") if options.quick else options.out
    folder = FOLDER.absolute()
    cache = BlockCache(folder / "blocks", settings)
    failed: list[str] = []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            measure_apart(blocks[name], cache, folder, is_quick=options.quick)
        except EvaluationError as error:
            failed.append(name)
            print(f"{error.what}: {error.got}. {error.fix}", file=sys.stderr, flush=True)
        path = write_report(out, name_of(settings), _kept(blocks, cache), settings, failed)
    print(path.with_suffix(".md").read_text("utf-8"))
    return 1 if failed else 0


def name_of(settings: BenchSettings) -> str:
    """Of the files: a processor that computes no bfloat16 does not overwrite what one has shown that does."""
    return "serving" if settings.dtype == "bfloat16" else f"serving-{settings.dtype}"


def _kept(blocks: dict[str, Block], cache: BlockCache) -> dict[str, dict[str, object]]:
    found = {name: cache.read(block) for name, block in blocks.items()}
    return {name: result for name, result in found.items() if result is not None}


if __name__ == "__main__":
    sys.exit(main())
