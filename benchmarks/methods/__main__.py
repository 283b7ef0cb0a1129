"""Every unlearning method side by side: `make bench-methods`.

    python -m benchmarks.methods                            docs/results/methods.{json,md,png}
    python -m benchmarks.methods --methods alter,npo_gd     some of them
    python -m benchmarks.methods --judge-url URL --judge-model NAME    fluency too, by a judge

Models are trained from scratch on TOFU and RWKU first, unless `build/tofu` has them. Every loss gets the
same search for its learning rate, by a criterion that sees training rows alone, and the same number of
epochs; what is found on TOFU is used on RWKU. A contender that fails, or a judge that is down, leaves its
reason in the table, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from alter_core.errors import AlterError, JudgeError
from alter_eval.data import default_data_dir
from alter_eval.judge import Judge
from benchmarks.results import write_results
from benchmarks.tofu.experiment import Figures
from benchmarks.tofu.reference import CACHE
from benchmarks.tofu.table import figure_table, plot_trade_off

from . import alter, published
from .contenders import CONTENDERS, EPOCHS, QUICK, Contender, named
from .data import check_release
from .jobs import RWKU, TOFU, Measured, Plan, measure, prepare
from .tasks import TofuTask

_TOFU_COLUMNS = (
    "forget_quality",
    "forget_loss_ks_p",
    "forget_nll",
    "utility_ratio",
    "extraction_strength",
    "privleak_perturbed",
    "paraphrase_leak_points",
    "repetition_ratio",
    "perplexity_under_base",
    "relearning_recovery_points",
    "int4_recovery_points",
    "train_s",
)
_JUDGED = ("fluency_mean", "fluency_variance")
_RWKU_COLUMNS = (
    "forget_level1_rouge_l",
    "forget_level2_rouge_l",
    "forget_level3_rouge_l",
    "neighbor_rouge_l",
    "train_s",
)
_FIGURES = {
    "forget_quality": "forget_quality_p",
    "utility_ratio": "model_utility_ratio",
    "extraction_strength": "extraction_strength",
    "paraphrase_leak_points": "paraphrase_leak_points",
    "repetition_ratio": "repetition_ratio",
    "train_s": "train_s",
}
"""By column: what the figure is called behind the method's name."""
_SERVING_PROMPTS = 32
Rows = dict[str, list[Figures]]


def main() -> int:
    """Measures what was asked for and writes `methods`; 1 if something was left out."""
    options = _parser().parse_args()
    try:
        chosen = named(",".join(QUICK) if options.quick else options.methods)
        data = default_data_dir()
        check_release(data)
    except AlterError as error:
        print(error, file=sys.stderr)
        return 2
    refused: dict[str, str] = {}
    judge_url = _judge(options, refused)
    plan = Plan(
        data=data,
        tasks=(TOFU,) if options.quick else (TOFU, RWKU),
        num_seeds=1 if options.quick else options.seeds,
        num_trials=2 if options.quick else options.trials,
        judge_url=judge_url,
        judge_model=options.judge_model,
    )
    started = time.monotonic()
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        prepared = {task: pool.submit(prepare, plan, task) for task in plan.tasks}
        references = {task: future.result() for task, future in prepared.items()}
        prepared_s = time.monotonic() - started
        jobs = {
            name: pool.submit(measure, plan, name, contender) for name, contender in chosen.items()
        }
        found = {}
        for name, job in jobs.items():
            found[name] = job.result()
            print(name, found[name], flush=True)
    refused |= {name: row.refused for name, row in found.items() if row.refused}
    serving = {} if options.quick else _serving(plan, found)
    out = Path("build") if options.quick else options.out
    path = _write(out, plan, chosen, found, references, serving, refused, prepared_s, started)
    print(path)
    for name, reason in refused.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=4, help="trainings of each search, at most")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--judge-url", help="base of an OpenAI-compatible API")
    parser.add_argument("--judge-model")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--quick", action="store_true", help="four methods, one seed, TOFU alone, into build/"
    )
    return parser


def _judge(options: argparse.Namespace, refused: dict[str, str]) -> str | None:
    """The judge's address if one was named and answers."""
    if not options.judge_url:
        return None
    judge = Judge(options.judge_url, options.judge_model or "")
    try:
        judge.check()
    except JudgeError as error:
        refused["judge"] = str(error)
        return None
    finally:
        judge.close()
    url: str = options.judge_url
    return url


def _serving(plan: Plan, found: Mapping[str, Measured]) -> dict[str, Any]:
    """What serving costs by vLLM, in a process of its own that has all cores."""
    from alter_eval import tofu
    from trainer.base_model import load_base_model

    task = TofuTask(plan.data)
    base = load_base_model(task.base_folder)
    made = alter.bundles(task, 0, CACHE)
    rows = task.bench.split.measured

    def prompts(name: str) -> list[list[int]]:
        encoded = tofu.encode(base.tokenizer, rows[name][:_SERVING_PROMPTS])
        return [list(row.ids[: row.num_prompt]) for row in encoded]

    strength = found["eco"].settings.get(f"strength/{TOFU}/0") if "eco" in found else None
    job = {
        "model": str(task.base_folder.absolute()),
        "substrate": str(made.substrate.absolute()),
        "experts": [str(made.expert.absolute())],
        "retain": prompts("retain"),
        "forget": prompts("forget"),
        "eco_strength": strength or 1.0,
        "rounds": 3,
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        ask.write_text(json.dumps(job))
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.methods.serving", str(ask), str(answer)],
            check=True,
            env=environment,
        )
        result: dict[str, Any] = json.loads(answer.read_bytes())
    return result


def _write(
    out: Path,
    plan: Plan,
    chosen: Mapping[str, Contender],
    found: Mapping[str, Measured],
    references: Mapping[str, Mapping[str, Figures]],
    serving: Mapping[str, Any],
    refused: Mapping[str, str],
    prepared_s: float,
    started: float,
) -> Path:
    rows = {
        task: {name: [figures] for name, figures in references[task].items()}
        | {name: row.figures[task] for name, row in found.items() if task in row.figures}
        for task in plan.tasks
    }
    tofu_rows = {name: [_derived(f, references[TOFU]) for f in r] for name, r in rows[TOFU].items()}
    out.mkdir(parents=True, exist_ok=True)
    plot_trade_off(out / "methods.png", rows[TOFU])
    judged = [key for key in _JUDGED if any(key in f for r in tofu_rows.values() for f in r)]
    parts = [
        "## TOFU\n\n" + figure_table(tofu_rows, (*_TOFU_COLUMNS, *judged)),
        *(["## RWKU\n\n" + figure_table(rows[RWKU], _RWKU_COLUMNS)] if RWKU in plan.tasks else []),
        "## What using it means\n\n" + _properties(chosen, found, serving),
        "## Published figures of the same methods\n\n" + published.table(),
    ]
    figures: dict[str, float | None] = {}
    spread: dict[str, tuple[float, float]] = {}
    for name, measured in tofu_rows.items():
        for column, suffix in _FIGURES.items():
            values = [value for f in measured if (value := f.get(column)) is not None]
            if values:
                figures[f"{name}_{suffix}"] = fmean(values)
                spread[f"{name}_{suffix}"] = (min(values), max(values))
    for name, measured in rows.get(RWKU, {}).items():
        for column in _RWKU_COLUMNS:
            values = [value for f in measured if (value := f.get(column)) is not None]
            if values:
                figures[f"{name}_rwku_{column}"] = fmean(values)
                spread[f"{name}_rwku_{column}"] = (min(values), max(values))
    not_measured = {}
    for key in ("eco_latency_ratio", "alter_latency_ratio"):
        if serving:
            figures[key], spread[key] = serving["figures"][key], serving["spread"][key]
        else:
            figures[key], not_measured[key] = None, "no engine was started"
    return write_results(
        out,
        "methods",
        title="Unlearning methods side by side",
        figures=figures,
        spread=spread,
        not_measured=not_measured,
        seed=0,
        notes={
            "rows": f"TOFU: {TofuTask.__doc__}",
            "seeds": plan.num_seeds,
            "search": f"at most {plan.num_trials} trainings a method, by bisection of the learning rate, "
            f"{EPOCHS} epochs each",
            "tried": {name: row.settings for name, row in found.items() if row.settings},
            "refused": dict(refused),
            "fluency by a judge": "measured" if judged else "not measured: no judge was named",
            "serving": "four engines side by side; ratios are medians over rounds, of prompts to retain and "
            "to forget alike" + (f"; started in {serving['start_s']:.0f} s" if serving else ""),
            "plot": "[trade-off](methods.png)",
            "models_s": round(prepared_s, 1),
            "methods_s": round(time.monotonic() - started - prepared_s, 1),
            "of an earlier call, by the same code": [n for n, row in found.items() if row.is_kept],
            "train_s": "wall-clock seconds on one thread, two processes at a time",
        },
        table="\n\n".join(parts),
    )


def _derived(figures: Figures, references: Mapping[str, Figures]) -> Figures:
    """With the ratios and differences that the table shows."""

    def of(row: Mapping[str, float | None], key: str) -> float:
        value = row[key]
        assert value is not None
        return value

    base, retrained = references["base"], references["retrained"]
    leak = "forget_paraphrased_Q_A_ROUGE"
    return figures | {
        "utility_ratio": of(figures, "model_utility") / of(base, "model_utility"),
        "paraphrase_leak_points": 100 * (of(figures, leak) - of(retrained, leak)),
        "repetition_ratio": of(figures, "repetition_rate") / of(retrained, "repetition_rate"),
    }


def _properties(
    chosen: Mapping[str, Contender], found: Mapping[str, Measured], serving: Mapping[str, Any]
) -> str:
    lines = [
        "| | parameters trained | served: tokens/s over base | latency over base | revocable | two compose |",
        "|---|---|---|---|---|---|",
    ]
    rates = serving.get("figures", {})
    for name, contender in chosen.items():
        cost = [
            1.0 if contender.served == "base" else rates.get(f"{contender.served}_{key}_ratio")
            for key in ("decode", "latency")
        ]
        cells = (
            f"{found[name].num_parameters:,}",
            *("not measured" if ratio is None else f"{ratio:.2f}" for ratio in cost),
            "yes" if contender.is_revocable else "no",
            "yes" if contender.is_composable else "no",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
