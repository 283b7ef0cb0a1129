"""From request to forgotten, and what it costs who is served meanwhile: `make bench-operator`.

    python -m benchmarks.operator                    docs/results/operator.{json,md}
    python -m benchmarks.operator --quick            a few of each, in build/
    python -m benchmarks.operator --blocks kills,ray these, beside what is kept of others

    request   40 rows from POST to active under a steady load, and traces beside prefills
    console   first load, and what axe-core finds; wants Chromium. After `request` it shows what that left
    kills     kill -9 of server and job at every state of a request
    ray       two replicas under Ray Serve: runs `tests/server/test_ray_serve.py`

Blocks that were measured are kept in `build/operator` with the command and time of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import keep, write_results

from . import kills, request
from .settings import FULL, QUICK, Settings

FOLDER = Path("build/operator")
BLOCKS = ("request", "console", "kills", "ray")
FIGURES = {
    "request_to_active_s": "request",
    "serving_throughput_while_training": "request",
    "trace_over_prefill": "request",
    "console_bytes": "console",
    "console_load_s": "console",
    "axe_violations": "console",
    "requests_lost_in_kills": "kills",
    "ray_replicas": "ray",
}
RAY_TEST = Path("tests/server/test_ray_serve.py")


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--blocks", help="names, separated by commas; by default all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = options.blocks.split(",") if options.blocks else list(BLOCKS)
    if unknown := [name for name in chosen if name not in BLOCKS]:
        parser.error(f"no such block: {', '.join(unknown)}; there are: {', '.join(BLOCKS)}")
    settings = dataclasses.replace(QUICK if options.quick else FULL, seed=options.seed)
    out = Path("build") if options.quick else options.out
    folder = FOLDER / ("quick" if options.quick else "full")
    _measure(chosen, folder, settings, out / "images" if options.quick else Path("docs/images"))
    results = {
        name: json.loads(path.read_text("utf-8"))
        for name in BLOCKS
        if (path := folder / f"{name}.json").exists()
    }
    figures = {name: results.get(block, {}).get(name) for name, block in FIGURES.items()}
    path = write_results(
        out,
        "operator",
        title="From request to forgotten",
        figures=figures,
        spread={n: tuple(s) for r in results.values() for n, s in r.get("spread", {}).items()},
        not_measured={
            name: f"the block `{FIGURES[name]}` has not been run"
            for name, value in figures.items()
            if value is None
        },
        notes={
            "settings": dataclasses.asdict(settings),
            **{name: r["notes"] | {"measured_at": r["at"]} for name, r in results.items()},
        },
        seed=options.seed,
    )
    print(path.with_suffix(".md").read_text("utf-8"))
    return 0


def _measure(chosen: list[str], folder: Path, settings: Settings, images: Path) -> None:
    def kept(name: str, result: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        keep(folder / f"{name}.json", result | {"at": at})

    if "kills" in chosen:
        found = kills.measure((folder / "kills").absolute(), settings)
        kept("kills", {"requests_lost_in_kills": found.pop("lost"), "notes": found})
    if "ray" in chosen:
        kept("ray", _ray())
    if "request" in chosen or "console" in chosen:
        from .world import serving

        with serving(settings.seed) as world:
            if "request" in chosen:
                kept("request", request.measure(world, settings))
            if "console" in chosen:
                from . import console

                kept("console", console.measure(world, settings, images))


def _ray() -> dict[str, Any]:
    """Raises: CalledProcessError if the test fails."""
    text = RAY_TEST.read_text("utf-8")
    count = re.search(r"^NUM_REPLICAS = (\d+)$", text, re.MULTILINE)
    assert count is not None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", str(RAY_TEST)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary = ended.stdout.strip().splitlines()[-1]
    if "passed" not in summary or "skipped" in summary:
        raise RuntimeError(summary)
    return {"ray_replicas": int(count[1]), "notes": {"test": str(RAY_TEST), "summary": summary}}


if __name__ == "__main__":
    sys.exit(main())
