"""The page of `docs/results/serving.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import write_results

from .blocks import Result
from .figures import BARS, GPU_PREFIX, NO_GPU, Figures, figures_of
from .models import SHAPES, Sizes
from .plots import plot_all
from .settings import GOODPUT_MS, RANK, BenchSettings


def write_report(
    folder: Path,
    name: str,
    results: Mapping[str, Result],
    settings: BenchSettings,
    failed: Iterable[str] = (),
) -> Path:
    """Writes `NAME.json`, `NAME.md` and the plots; `results` by block name."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_of(results, settings)
    plots = plot_all(folder, name, results, settings)
    return write_results(
        folder,
        name,
        title="Serving with forget experts over base vLLM",
        figures=figures.values,
        spread=figures.spread,
        not_measured=figures.not_measured,
        seed=settings.seed,
        notes=_notes(results, settings) | {"blocks that failed": list(failed) or "none"},
        table=_page(figures, plots, settings),
    )


def _notes(results: Mapping[str, Result], settings: BenchSettings) -> dict[str, Any]:
    shapes = {model: Sizes.of(SHAPES[model]) for model in settings.models}
    notes: dict[str, Any] = {
        "model of the named figures": settings.headline_model,
        "models": {
            model: f"Llama, random weights, {settings.dtype}, {sizes.num_parameters / 1e6:.1f}M parameters"
            for model, sizes in shapes.items()
        },
        "active domains of the named figures": settings.num_domains,
        "rank": RANK,
        "rounds, by start": settings.rounds,
        "decode": f"up to {settings.decode_tokens} tokens a request after a prompt of "
        f"{settings.decode_prompt_tokens}; by batch size, batches a round {dict(settings.decode_repeats)}, "
        f"steps a turn {dict(settings.decode_steps)}",
        "mixed traffic": "every tenth request of a forget domain",
        "prefill_ratio_retain": f"the lowest over prompts of {list(settings.prefill_repeats)} tokens",
        "n256_over_n1": "retain traffic, the lowest over batch sizes",
        "post_to_active_s": "of a bundle that weighs what a 7B's of rank 8 weighs, under load",
        "goodput": f"first token and mean later ones within {dict(GOODPUT_MS)} ms",
        "memory": "of all processes of a server, shared pages in parts",
    }
    for block, result in results.items():
        if block.startswith("online"):
            shown = ("arrivals", "requests", "mean_prompt_tokens", "mean_answer_tokens")
            notes[block] = {key: result[key] for key in (*shown, "share_on_experts")}
        if "expert_share" in result:
            notes[f"{block}: share of tokens on experts"] = {
                engine: {case: round(share, 3) for case, share in shares.items()}
                for engine, shares in result["expert_share"].items()
            }
    notes["measured, load before, seconds"] = {
        block: [result["measured_at"], result["load_before"], result["seconds"]]
        for block, result in results.items()
    }
    return notes


def _page(figures: Figures, plots: Iterable[str], settings: BenchSettings) -> str:
    lines = ["| figure | value | lowest | highest | bar |", "|---|---|---|---|---|"]
    lines += [_line(figures, name, BARS[name]) for name in BARS]
    lines += ["", f"Figures with the prefix `{GPU_PREFIX}`: {NO_GPU}.", ""]
    lines += [f"![{plot}]({plot})" for plot in plots]
    for model in reversed(settings.models):
        found = [name for name in figures.values if name.startswith(f"{model}/")]
        if not found:
            continue
        lines += ["", f"## {model}", "", "| measurement | value | lowest | highest | |"]
        lines += ["|---|---|---|---|---|", *(_line(figures, name, "") for name in found)]
    return "\n".join(lines)


def _line(figures: Figures, name: str, bar: str) -> str:
    value = figures.values[name]
    low, high = figures.spread.get(name, ("", ""))
    shown = f"not measured: {figures.not_measured[name]}" if value is None else f"{value:g}"
    return f"| `{name}` | {shown} | {low} | {high} | {bar} |"
