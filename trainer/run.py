"""One run of `alter train`: data, entropy pass, substrate, evidence heads, experts, evaluation.

OUT/substrate/     bundle, unless an existing one was given
OUT/NAME/          bundle of each forget expert
OUT/run.json       resolved settings, versions, seed, seconds; `run-NAME....json` for added experts
OUT/.work/         entropy cache and checkpoints, for --resume; safe to delete
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from alter_core.attach import AttachedModel
from alter_core.bundle import DOMAIN_NAME_PATTERN, DataDigest, Provenance
from alter_core.config import AlterConfig
from alter_core.errors import ConfigError
from alter_core.evidence import EvidenceHead
from alter_core.sites import decoder_layers, default_tap_layer
from alter_core.substrate import ForgetExpert, Substrate

from . import evaluation
from .base_model import BaseModel, load_base_model
from .batches import sample_rows
from .checkpoint import WORK_FOLDER, Checkpoints
from .dataset import EncodedRow, Row, check_disjoint, data_digest, encode_rows, read_rows
from .entropy_pass import cached_entropy, write_atomically
from .experts import ExpertTraining
from .progress import Reporter, SilentReporter
from .router import train_evidence
from .scalar_router import train_scalar_weight
from .settings import TrainSettings
from .substrate import learn_shared, learns_shared, new_substrate

_METHOD = "ALTER (arXiv 2603.01792)"
_MAX_ROW_TOKENS = 1024
_EVALUATION_TOKENS = 8_000
_PACKAGES = ("alter-server", "torch", "transformers", "accelerate", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run made."""

    substrate: Path
    experts: dict[str, Path]
    seconds: dict[str, float]
    """By stage."""


def train(settings: TrainSettings, reporter: Reporter | None = None) -> TrainResult:
    """Runs `alter train`. Existing bundles are never touched.

    Raises: ConfigError, TrainingDataError, TrainingError, UnsupportedModelError, BundleError; whatever was
    finished before stays, and `resume` goes on from there.
    """
    return _Run(settings, reporter or SilentReporter()).run()


class _Run:
    def __init__(self, settings: TrainSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.seconds: dict[str, float] = {}
        for name in settings.forget:
            _check_name(name)
        self.experts = {name: settings.out / name for name in settings.forget}
        self.substrate_folder = settings.substrate or settings.out / "substrate"
        self._refuse_existing_output()
        self.raw = self._read_data()
        self.base = load_base_model(
            settings.model,
            device=settings.device,
            mixed_precision=settings.mixed_precision,
            has_double_backward=settings.shared.structure_weight > 0,
        )
        self.config = self._config()
        max_tokens = settings.max_tokens or min(self.base.max_tokens, _MAX_ROW_TOKENS)
        self.rows = {
            name: encode_rows(rows, self.base.tokenizer, max_tokens=max_tokens)
            for name, rows in self.raw.items()
        }
        self.checkpoints = Checkpoints(settings.out / WORK_FOLDER, self._run_key())
        self.embeddings: Tensor = (
            self.base.model.get_input_embeddings().weight.detach().float().cpu()
        )

    def run(self) -> TrainResult:
        with self._timed("entropy_pass"):
            entropies = {name: self._entropy(name) for name in ("retain", *self.settings.forget)}
        with self._timed("substrate"):
            substrate, figures = self._substrate()
        normalised = substrate.normalise(self.embeddings)
        heads: dict[str, EvidenceHead] = {}
        calibrations: dict[str, dict[str, float]] = {}
        for name in self._unfinished():
            with self._timed(f"evidence_{name}"):
                heads[name], calibrations[name] = self._head(name, normalised, substrate.config)
        if substrate.digest is None:
            with self._timed("substrate_joint"):
                substrate = self._write_substrate(substrate, heads, entropies, figures)
        for name, head in heads.items():
            with self._timed(f"expert_{name}"):
                self._expert(name, substrate, head, calibrations[name], entropies[name], normalised)
        self._write_record(figures)
        return TrainResult(
            substrate=self.substrate_folder, experts=self.experts, seconds=self.seconds
        )

    def _refuse_existing_output(self) -> None:
        made = [*self.experts.values()]
        if self.settings.substrate is None:
            made.append(self.substrate_folder)
        existing = [path for path in made if path.exists()]
        if existing and not self.settings.resume:
            raise ConfigError(
                "The output exists already, and bundles are never overwritten",
                expected=f"none of {', '.join(path.name for path in made)} in {self.settings.out}",
                got=", ".join(path.name for path in existing),
                fix="Choose another --out or name, or --resume an interrupted run.",
            )

    def _read_data(self) -> dict[str, list[Row]]:
        settings = self.settings
        reserved = {"retain", "general", "substrate"} & settings.forget.keys()
        if reserved:
            raise ConfigError("A domain cannot have that name", got=", ".join(sorted(reserved)))
        raw = {name: read_rows([path]) for name, path in settings.forget.items()}
        raw["retain"] = read_rows(settings.retain)
        raw["general"] = read_rows(settings.general) if settings.general else []
        check_disjoint(raw)
        return raw

    def _config(self) -> AlterConfig:
        if self.settings.substrate is not None:
            return Substrate.read(self.settings.substrate, self.base.info).config
        fields = dict(self.settings.config)
        if "tap_layer" not in fields:
            fields["tap_layer"] = default_tap_layer(len(decoder_layers(self.base.model)))
        return AlterConfig(**fields)  # type: ignore[arg-type]

    def _run_key(self) -> str:
        """Digest of everything that the result depends on."""
        settings = dataclasses.replace(self.settings, resume=False, out=Path())
        data = {name: data_digest(rows).sha256 for name, rows in self.raw.items()}
        content = [_plain(settings), data, self.base.info.fingerprint, _plain(self.config)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _entropy(self, name: str) -> list[Tensor]:
        return cached_entropy(
            self.base,
            self.rows[name],
            tsallis_q=self.config.tsallis_q,
            tap_layer=self.config.tap_layer,
            folder=self.settings.out / WORK_FOLDER,
        )

    def _substrate(self) -> tuple[Substrate, dict[str, float]]:
        """The one that exists, or a new one without a digest."""
        if self.settings.substrate is not None or self.substrate_folder.exists():
            return Substrate.read(self.substrate_folder, self.base.info), {}
        forget = [row for name in self.settings.forget for row in self.rows[name]]
        texts = {"forget": forget, "retain": self.rows["retain"], "general": self.rows["general"]}
        return new_substrate(
            self.base,
            self.config,
            texts,
            self.settings.shared,
            seed=self.settings.seed,
            reporter=self.reporter,
        )

    def _write_substrate(
        self,
        substrate: Substrate,
        heads: Mapping[str, EvidenceHead],
        entropies: Mapping[str, list[Tensor]],
        figures: dict[str, float],
    ) -> Substrate:
        if learns_shared(self.config, self.settings.shared):
            substrate = learn_shared(
                self.base,
                substrate,
                heads,
                {name: (self.rows[name], entropies[name]) for name in heads},
                (self.rows["retain"], entropies["retain"]),
                self.settings.shared,
                seed=self.settings.seed,
                reporter=self.reporter,
            )
        return substrate.write(
            self.substrate_folder,
            name="substrate",
            training=self._provenance(self.raw, self.settings.shared),
            evaluation=_finite(figures),
        )

    def _unfinished(self) -> list[str]:
        return [name for name, folder in self.experts.items() if not folder.exists()]

    def _negatives(self, name: str) -> list[Sequence[int]]:
        """Text on which a domain's head may not fire, most important first."""
        others = [other for other in self.settings.forget if other != name]
        return [row.ids for part in (*others, "retain", "general") for row in self.rows[part]]

    def _head(
        self, name: str, normalised: Tensor, config: AlterConfig
    ) -> tuple[EvidenceHead, dict[str, float]]:
        checkpoint = f"evidence-{name}"
        if (saved := self.checkpoints.load(checkpoint)) is not None:
            tensors, calibration = saved
            head = EvidenceHead(
                normalised.shape[1], ngram=config.evidence_ngram, num_units=config.evidence_units
            )
            head.load_state_dict(tensors)
            return head.requires_grad_(False), calibration
        evidence = self.settings.evidence
        with self.reporter.bar(f"evidence head {name}", evidence.num_steps) as bar:
            head, calibration = train_evidence(
                normalised,
                self.rows[name],
                self._negatives(name),
                config,
                evidence,
                seed=self.settings.seed,
                progress=lambda loss: bar.advance(loss=loss),
            )
        self.checkpoints.save(checkpoint, head.state_dict(), calibration)
        return head, calibration

    def _expert(
        self,
        name: str,
        substrate: Substrate,
        head: EvidenceHead,
        calibration: dict[str, float],
        entropies: list[Tensor],
        normalised: Tensor,
    ) -> None:
        settings, rows = self.settings, self.rows[name]
        before = evaluation.mean(evaluation.answer_probabilities(self.base, rows))
        training = ExpertTraining(
            self.base,
            substrate,
            name,
            head,
            rows,
            entropies,
            settings.experts,
            seed=settings.seed,
        )
        steps = training.train(self.reporter, self.checkpoints)
        expert = training.expert()
        if substrate.config.router == "scalar":
            expert = dataclasses.replace(expert, scalar_weight=self._scalar_weight(name, entropies))
        figures = {"forget_probability_before": before, "steps": steps, **calibration}
        figures |= self._evaluate(name, substrate, expert, normalised)
        expert.write(
            self.experts[name],
            substrate,
            training=self._provenance(
                {
                    name: self.raw[name],
                    "retain": self.raw["retain"],
                    "general": self.raw["general"],
                },
                settings.experts,
                settings.evidence,
            ),
            evaluation=_finite(figures),
        )

    def _scalar_weight(self, name: str, entropies: list[Tensor]) -> float:
        return train_scalar_weight(entropies, self._entropy("retain"))

    def _evaluate(
        self, name: str, substrate: Substrate, expert: ForgetExpert, normalised: Tensor
    ) -> dict[str, float]:
        rows = self.rows[name]
        negatives = {
            part: [row.ids for row in self.rows[part]]
            for part in ("retain", "general")
            if self.rows[part]
        }
        figures = evaluation.evidence_figures(
            expert.evidence.cpu(), normalised, substrate.config, rows, negatives
        )
        attached = AttachedModel(self.base.model, substrate, [expert])
        try:
            probabilities = evaluation.answer_probabilities(self.base, rows)
            figures["forget_probability"] = evaluation.mean(probabilities)
            figures["forget_rouge_l"] = evaluation.mean(evaluation.greedy_rouge_l(self.base, rows))
            retained = sample_rows(self.rows["retain"], _EVALUATION_TOKENS, self.settings.seed)
            retained = [row for row in retained if row.num_prompt]
            if retained:
                figures["retain_identical"] = evaluation.completion_agreement(
                    self.base, attached, retained
                )
        finally:
            attached.detach()
        return figures

    def _provenance(self, data: Mapping[str, list[Row]], *settings: Any) -> Provenance:
        fields: dict[str, Any] = {}
        for part in settings:
            fields |= dataclasses.asdict(part)
        digests: dict[str, DataDigest] = {n: data_digest(rows) for n, rows in data.items() if rows}
        return Provenance(
            method=_METHOD,
            data=digests,
            seed=self.settings.seed,
            settings=fields,
            versions=_versions(),
        )

    def _write_record(self, figures: dict[str, float]) -> None:
        is_addition = self.settings.substrate is not None
        stem = "-".join(["run", *self.experts]) if is_addition else "run"
        record = {
            "settings": _plain(self.settings),
            "config": _plain(self.config),
            "substrate_figures": _finite(figures),
            "versions": _versions(),
            "commit": _commit(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        content = json.dumps(record, indent=1) + "\n"
        write_atomically(self.settings.out / f"{stem}.json", content.encode())

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started


def _check_name(name: str) -> None:
    import re

    from alter_core.errors import DomainNameError

    if not re.match(DOMAIN_NAME_PATTERN, name):
        raise DomainNameError(
            "A forget domain cannot have that name",
            expected="1 to 63 characters out of a-z, 0-9 and '-'",
            got=repr(name),
        )


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that JSON can hold, rounded."""
    return {k: round(float(v), 6) for k, v in figures.items() if math.isfinite(v)}


def _plain(value: Any) -> Any:
    """Dataclasses and paths as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    """Commit of the source that runs, if it runs from a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
