"""Injects faults into fleets and counts what they break: `make faults`.

    python -m benchmarks.faults                          everything, docs/results/faults.{json,md}
    python -m benchmarks.faults --quick                  a few of each, in build/
    python -m benchmarks.faults --blocks fleets,barrier  these, beside what is kept of others

    fleets   processes with the whole server over the engine's double: thousands of faults
    real     three `alter serve` of a tiny model
    churn    many switches of one `alter serve`, and what they leave in its memory
    barrier  from the slowest server's switch to `active`, with eight servers
    schema   schemathesis over the admin side

Everything stays on this machine: Unix sockets and the loopback interface. Results of blocks, and of each
fleet, are kept in `build/faults` until the settings or the sources of a block change, so a run can be
interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from alter_cli.demo.artefacts import package_folder, sources
from benchmarks.results import keep
from benchmarks.serving.blocks import SERVER_PACKAGES
from tests.support.tiny import TinyBundles, make_bundles

from . import barrier, lanes
from .report import write_report
from .settings import FULL, QUICK, FaultSettings

FOLDER = Path("build/faults")
NUM_EXPERTS = 5
RESULT = "result.json"
RUN = "run"
_SHOWING = {"__main__", "report"}
"""Modules that no result follows from."""
_OWN = {
    "fleets": set[str](),
    "real": {"real", "churn"},
    "churn": {"real", "churn"},
    "barrier": {"barrier"},
    "schema": {"schema"},
}
"""Modules of single blocks; all share the others."""

Measure = Callable[[Path, FaultSettings], dict[str, Any]]


def main() -> int:
    """Measures the blocks one after another; the exit status is 1 if a bar that was measured is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--blocks", help="names, separated by commas; by default all")
    parser.add_argument("--quick", action="store_true", help="a few of each, written to build/")
    parser.add_argument("--report", action="store_true", help="write up what is kept, and stop")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # As Ctrl-C, which asyncio makes a cancellation: what was started is ended. Shells that start it in the
    # background have Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    chosen = options.blocks.split(",") if options.blocks else list(BLOCKS)
    if unknown := [name for name in chosen if name not in BLOCKS]:
        parser.error(f"no such block: {', '.join(unknown)}; there are: {', '.join(BLOCKS)}")
    settings = (QUICK if options.quick else FULL).with_seed(options.seed)
    out = Path("build") if options.quick else options.out
    folders = {name: FOLDER.absolute() / f"{name}-{_digest(settings, name)}" for name in BLOCKS}
    if options.report:
        chosen, report = [], write_report(out, settings, _kept(folders))
    for name in chosen:
        path = folders[name] / RESULT
        try:
            if not path.exists():
                print(f"{name} ...", file=sys.stderr, flush=True)
                folders[name].mkdir(parents=True, exist_ok=True)
                keep(path, BLOCKS[name](folders[name], settings))
        finally:
            report = write_report(out, settings, _kept(folders))
    print(report.with_suffix(".md").read_text("utf-8"))
    return 1 if json.loads(report.read_text("utf-8"))["notes"]["bars_missed"] else 0


def _kept(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is measured of the blocks, and of `fleets` also what it has so far."""
    paths = {name: folder / RESULT for name, folder in folders.items()}
    found = {name: json.loads(p.read_text("utf-8")) for name, p in paths.items() if p.exists()}
    if "fleets" not in found and (episodes := _episodes(folders["fleets"])):
        found["fleets"] = {"episodes": episodes}
    return found


def _episodes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("episode-*.json"))]


def _digest(settings: FaultSettings, block: str) -> str:
    left_out = _SHOWING | (set[str]().union(*_OWN.values()) - _OWN[block])
    ours = sorted(package_folder("benchmarks.faults").glob("*.py"))
    texts = [repr(settings), *(p.read_text("utf-8") for p in ours if p.stem not in left_out)]
    texts += [sources(package_folder(package)) for package in (*SERVER_PACKAGES, "tests.support")]
    texts.append(sources(package_folder("benchmarks"), "admin_fuzz"))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _bundles(folder: Path) -> TinyBundles:
    """A model, a substrate and experts, made once for a block that does without vLLM."""
    made = folder / "bundles"
    if not (made / "done").exists():
        make_bundles(made, num_experts=NUM_EXPERTS)
        (made / "done").touch()
    names = [f"domain-{index}" for index in range(NUM_EXPERTS)]
    return TinyBundles(
        model=made / "model",
        substrate=made / "substrate",
        experts={name: made / name for name in names},
    )


def _fleets(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    return {"episodes": lanes.run_all(_bundles(folder), folder, settings)}


def _real(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    from . import real

    return real.measure(folder / RUN, settings)


def _churn(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    from . import real

    return real.measure_churn(folder / RUN, settings)


def _barrier(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    return {"ms": barrier.measure(_bundles(folder), folder / RUN, settings)}


def _schema(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    from . import schema

    return schema.measure(_bundles(folder), folder / RUN, settings)


BLOCKS: dict[str, Measure] = {
    "fleets": _fleets,
    "real": _real,
    "churn": _churn,
    "barrier": _barrier,
    "schema": _schema,
}


if __name__ == "__main__":
    sys.exit(main())
