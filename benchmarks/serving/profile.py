"""Where the time of a step goes, by torch's profiler: `python -m benchmarks.serving.profile`.

For each case of the offline blocks, of base, of vLLM's LoRA and of ours, in turn: the operators that take
most time of their own, and the share of ALTER's with everything inside them. Profiling slows a step down,
small operators most; the shares tell where to look, not what is saved.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.results import write_results

from .artefacts import Artefacts
from .offline import BASE, LORA, Case, Engine, cases_of, take_turns
from .operators import Operator, read_table
from .settings import FULL, QUICK, BenchSettings
from .traffic import TrafficKind

_SHOWN_OPERATORS = 12
_OURS = "alter"
"""How the names of our operators begin."""


def main() -> None:
    """Profiles all cases of one model and writes `serving-profile`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="few cases, written to build/")
    parser.add_argument(
        "--no-lora", action="store_true", help="without vLLM's LoRA, which takes most of the time"
    )
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL
    folder = Path("build/serving").absolute()
    made = Artefacts.of(folder / "artefacts", settings.headline_model, seed=settings.seed)
    figures: dict[str, float | None] = {}
    tables: list[str] = []
    engines = {BASE: 0, LORA: 0, f"n{settings.num_domains}": settings.num_domains}
    if options.no_lora:
        del engines[LORA]
    for engine, case, operators in _profiles(made, settings, folder / "profiles", engines):
        for operator in operators:
            if operator.name.startswith(_OURS):
                figures[f"{engine}/{case}/{operator.name}"] = round(operator.total_share, 4)
        tables += ["", f"## {engine}, {case}", "", *_table(operators)]
    path = write_results(
        Path("build") if options.quick else options.out,
        "serving-profile",
        title="Profiles of a step, base, vLLM's LoRA and ours",
        figures=figures,
        seed=settings.seed,
        notes={
            "model": settings.headline_model,
            "active domains": settings.num_domains,
            "figures": "share of the profile, with everything that the operator calls",
        },
        table="\n".join(tables),
    )
    print(path)


def _profiles(
    made: Artefacts, settings: BenchSettings, folder: Path, engines: Mapping[str, int]
) -> Iterator[tuple[str, str, list[Operator]]]:
    """(engine, case, operators), one engine at a time; `engines` with their numbers of domains."""
    for name, num_domains in engines.items():
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": str(out),
            "torch_profiler_with_stack": False,
        }
        engine = Engine(name, made, settings.dtype, num_domains, profiler_config=profiler)
        for case in cases_of(settings):
            if num_domains or case.kind is TrafficKind.RETAIN:
                yield name, case.name, _profiled(engine, case, settings, out)
        engine.stop()


def _profiled(engine: Engine, case: Case, settings: BenchSettings, out: Path) -> list[Operator]:
    take_turns([engine], case, settings, start=0)
    engine.llm.start_profile(case.name)
    take_turns([engine], case, settings, start=0)
    engine.llm.stop_profile()
    (table,) = out.glob(f"{case.name}_*.profiler_out.txt")
    return read_table(table.read_text("utf-8"))


def _table(operators: Sequence[Operator]) -> Iterator[str]:
    yield "| operator | own time | with what it calls | calls |"
    yield "|---|---|---|---|"
    kept = [op for op in operators if op.name.startswith(_OURS)]
    top = [op for op in operators[:_SHOWN_OPERATORS] if op not in kept]
    for op in [*top, *kept]:
        yield f"| `{op.name}` | {op.self_share:.1%} | {op.total_share:.1%} | {op.calls} |"


if __name__ == "__main__":
    main()
