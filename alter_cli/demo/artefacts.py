"""The demo's corpus, base model and experts, made once and kept under `build/demo`.

Folders are named after a digest of what they were made from, settings and source code alike, so a
kept artefact is never taken for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from alter_core.errors import TrainingError
from alter_core.machine import fast_dtype

from . import authors, tofu
from .corpus import Corpus

EXPERTS = "experts"
_BASE_SOURCES = "base_model,corpus,memorization,recall,tokenizer"
"""What a base model follows from, beside its rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefacts:
    """Folders of everything that is served."""

    corpus: Corpus
    model: Path
    substrate: Path
    experts: dict[str, Path]
    """Bundle by domain."""
    dtype: str
    """Of the model, and to be served in: vLLM would choose another one for float32."""
    timings_s: dict[str, float]
    """Seconds spent on each; 0 where the kept one was used."""


def load_corpus(
    dataset: str, *, num_authors: int | None, num_domains: int, data_dir: Path, seed: int
) -> Corpus:
    """The generated authors (`authors`) or real TOFU (`tofu`)."""
    if dataset == "tofu":
        return tofu.load(
            data_dir, num_authors=num_authors or 40, num_domains=num_domains, seed=seed
        )
    if num_authors is None:
        return authors.generate(num_domains=num_domains, seed=seed)
    return authors.generate(num_authors=num_authors, num_domains=num_domains, seed=seed)


def make(corpus: Corpus, folder: Path, *, seed: int, console: Console) -> Artefacts:
    """Makes what is missing. Raises: TrainingError if the base model does not learn its rows."""
    rows = json.dumps(
        [
            corpus.name,
            seed,
            {part: [dataclasses.astuple(r) for r in rows] for part, rows in corpus.parts().items()},
        ]
    )
    dtype = str(fast_dtype()).removeprefix("torch.")
    base_key = _digest(
        rows, "".join(corpus.general), dtype, sources(Path(__file__).parent, _BASE_SOURCES)
    )
    base = folder / f"{corpus.name}-{base_key}"
    base.mkdir(parents=True, exist_ok=True)
    timings = {"base_model": 0.0, "experts": 0.0}
    if not (base / "model").exists():
        started = time.monotonic()
        _train_base(corpus, base / "model", seed=seed, console=console)
        timings["base_model"] = time.monotonic() - started
    files = corpus.save(base)
    expert_key = _digest(
        base_key,
        sources(package_folder("trainer")),
        sources(package_folder("alter_core")),
    )
    experts = base / f"{EXPERTS}-{expert_key}"
    if not (experts / "run.json").exists():
        started = time.monotonic()
        _train_experts(corpus, base / "model", files, experts, seed=seed, console=console)
        timings["experts"] = time.monotonic() - started
    return Artefacts(
        corpus=corpus,
        model=base / "model",
        substrate=experts / "substrate",
        experts={name: experts / name for name in corpus.domains},
        dtype=dtype,
        timings_s=timings,
    )


def _train_base(corpus: Corpus, out: Path, *, seed: int, console: Console) -> None:
    # Imported only where a model is to be trained: transformers takes seconds to load.
    from .base_model import train_base
    from .training_bar import training_bar

    with training_bar(console) as progress:
        train_base(corpus, out, seed=seed, progress=progress)


def _train_experts(
    corpus: Corpus, model: Path, files: dict[str, Path], out: Path, *, seed: int, console: Console
) -> None:
    command = ["alter", "train", str(model), "--out", str(out), "--seed", str(seed)]
    for name in corpus.domains:
        command += ["--forget", f"{name}={files[f'domain-{name}']}"]
    command += ["--retain", str(files["retain"])]
    command += ["--general", str(files["general"]), "--general", str(files["unseen"])]
    console.print(f"[dim]$ {' '.join(command)}[/]", highlight=False)
    result = subprocess.run([sys.executable, "-m", "alter_cli.main", *command[1:]], check=False)
    if result.returncode:
        raise TrainingError("Training the experts failed", got=f"exit code {result.returncode}")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def package_folder(name: str) -> Path:
    """Folder of a package, found without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def sources(package: Path, names: str = "*") -> str:
    """Source code of a package's modules; `names` is a glob pattern, several separated by a comma."""
    paths = {path for name in names.split(",") for path in package.glob(f"{name}.py")}
    return "".join(path.read_text("utf-8") for path in sorted(paths))
