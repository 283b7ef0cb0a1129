"""One run of `alter train`: data, substrate, then expert by expert; each part a bundle once it is complete.

    out/substrate/            bundle
    out/NAME/                 bundle, one per domain
    out/run.json              what was run, written last: it stands only beside complete output
    out/.cache, .checkpoints  entropies of the base model; where to go on after an interruption

A bundle carries the key of the run that made it, so `resume` takes only parts that belong to the same data,
settings, seed and base model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alter_core.bundle import DataDigest, Provenance, read_manifest
from alter_core.config import AlterConfig
from alter_core.errors import ConfigError, NothingToForgetError, TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.rows import data_digest
from alter_core.sites import default_tap_layer
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import load_base_model
from .batches import sample_rows
from .checkpoint import write_atomically
from .counterfactual import Counterfactuals, counterfactual_rows
from .dataset import EncodedRow, encode_rows
from .domains import cluster_rows
from .entropy_pass import cached_entropy
from .evaluation import answer_losses, expert_figures, mean
from .experts import train_expert
from .inputs import SUBSTRATE_NAME, domain_names, part_of, read_parts
from .joint import is_learned, train_joint
from .progress import Reporter, SilentReporter
from .provenance import hardware, versions
from .router import train_evidence, train_scalar_weight
from .settings import TrainSettings
from .substrate import (
    Figures,
    SubstrateText,
    initial_substrate,
    measure_text,
    normalised_embeddings,
    on_device,
    rounded,
    train_estimator,
)

METHOD = "alter"
RUN_FILE = "run.json"
_RUN_KEY = "run"
_MAX_KNOWN_LOSS = 0.8
"""Of the loss on counterfactual rows, which read a little less naturally than text that was never seen."""
_CHECKPOINTS = ".checkpoints"
_CACHE = ".cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind."""

    substrate: Path
    experts: dict[str, Path]
    """Bundle by domain."""
    timings_s: dict[str, float]
    """Seconds by part; a part that was resumed complete is missing."""
    evaluation: dict[str, dict[str, Any]]
    """Figures of `substrate` and of each domain, as in the bundles."""
    run_file: Path


def train(settings: TrainSettings, progress: Reporter | None = None) -> TrainResult:
    """Trains a substrate (unless one is given) and an expert for every forget domain.

    Raises: TrainingDataError, ConfigError, UnsupportedModelError, DomainNameError, TrainingError,
    BundleError.
    """
    return _Run(settings, progress or SilentReporter()).execute()


class _Run:
    def __init__(self, settings: TrainSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.timings_s: dict[str, float] = {}
        self.evaluation: dict[str, dict[str, Any]] = {}
        self.names = domain_names(settings)
        rows = read_parts(settings)
        self.digests = {name: data_digest(part) for name, part in rows.items()}
        self._check_output()
        self.base = load_base_model(
            settings.model,
            device=settings.device,
            mixed_precision=settings.mixed_precision,
            has_double_backward=settings.substrate_settings.structure_weight > 0,
        )
        max_tokens = min(settings.max_tokens, self.base.max_tokens)
        encoded = {
            name: encode_rows(part, self.base.tokenizer, max_tokens=max_tokens)
            for name, part in rows.items()
        }
        self.retain, self.general = encoded.pop("retain"), encoded.pop("general", [])
        self.substrate_folder = settings.substrate or settings.out / SUBSTRATE_NAME
        self.given = self._given_substrate()
        self.config = self.given.config if self.given else self._config()
        self.forget = self._domains(encoded)
        self.counterfactuals = Counterfactuals(
            self.base.tokenizer,
            [row.ids for row in (*self.retain, *self.general)],
            [row.ids for rows in self.forget.values() for row in rows],
            kept_share=settings.expert_settings.kept_share,
        )
        self.key = self._run_key()

    def execute(self) -> TrainResult:
        torch.manual_seed(self.settings.seed)
        if not self.settings.resume:
            shutil.rmtree(self.settings.out / _CHECKPOINTS, ignore_errors=True)
        if not self.general:
            self.reporter.say(
                "No --general text: experts may act on text that has nothing to do with them."
            )
        self.base_loss = {name: self._knowledge(name) for name in self.forget}
        substrate = on_device(self.given or self._substrate(), self.base.device)
        embeddings = normalised_embeddings(self.base, substrate)
        experts = {name: self._expert(name, substrate, embeddings) for name in self.forget}
        run_file = self._write_run_file()
        shutil.rmtree(self.settings.out / _CHECKPOINTS, ignore_errors=True)
        return TrainResult(
            substrate=self.substrate_folder,
            experts=experts,
            timings_s=self.timings_s,
            evaluation=self.evaluation,
            run_file=run_file,
        )

    # --- what is asked for ---

    def _check_output(self) -> None:
        settings = self.settings
        folders = [settings.out / name for name in self.names]
        if settings.substrate is None:
            folders.append(settings.out / SUBSTRATE_NAME)
        taken = [folder for folder in folders if folder.exists()]
        if taken and not settings.resume:
            raise ConfigError(
                "There is output already",
                expected="no folder of that name",
                got=", ".join(str(folder) for folder in taken),
                fix="Choose another --out, or go on with an interrupted run by --resume.",
            )

    def _given_substrate(self) -> Substrate | None:
        if self.settings.substrate is None:
            return None
        if self.settings.alter:
            raise ConfigError(
                "The substrate fixes the method's settings",
                expected="none of them beside --substrate",
                got=", ".join(sorted(self.settings.alter)),
                fix="Leave them out, or train a new substrate.",
            )
        return Substrate.read(self.settings.substrate, self.base.info)

    def _config(self) -> AlterConfig:
        overrides = {
            "tap_layer": default_tap_layer(self.base.info.num_layers),
            **self.settings.alter,
        }
        if "rank" in overrides:
            overrides.setdefault("lora_alpha", 2.0 * overrides["rank"])
        return AlterConfig(**overrides)

    def _domains(self, encoded: Mapping[str, list[EncodedRow]]) -> dict[str, list[EncodedRow]]:
        """Rows by domain: as the operator named them, or as clustering cuts them."""
        if not self.settings.auto_domains:
            return {name: encoded[part_of(name)] for name in self.names}
        (rows,) = encoded.values()
        if len(rows) < len(self.names):
            raise ConfigError(
                "There are more domains than rows",
                expected=f"at most {len(rows)}",
                got=f"{len(self.names)}",
            )
        clusters = cluster_rows(
            self.base,
            rows,
            len(self.names),
            tap_layer=self.config.tap_layer,
            seed=self.settings.seed,
        )
        domains = {
            name: [row for row, cluster in zip(rows, clusters, strict=True) if cluster == number]
            for number, name in enumerate(self.names)
        }
        if empty := [name for name, members in domains.items() if not members]:
            raise ConfigError(
                "The rows do not fall into so many domains",
                expected=f"{len(self.names)} clusters",
                got=f"{len(self.names) - len(empty)}",
                fix="Ask for fewer --auto-domains.",
            )
        return domains

    def _run_key(self) -> str:
        key = {
            "base": self.base.info.fingerprint,
            "substrate": self.given.digest if self.given else None,
            "config": dataclasses.asdict(self.config),
            "settings": self.settings.flat(),
            "data": {name: digest.model_dump() for name, digest in self.digests.items()},
            "domains": self.names,
            "seed": self.settings.seed,
            "device": self.base.device.type,
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    # --- substrate ---

    def _substrate(self) -> Substrate:
        folder = self.substrate_folder
        if folder.exists():
            self._check_resumed(folder)
            substrate = Substrate.read(folder, self.base.info)
            self.evaluation[SUBSTRATE_NAME] = {"resumed": True}
            return substrate
        started = time.monotonic()
        settings = self.settings.substrate_settings
        seed = self.settings.seed
        text = SubstrateText(
            forget={
                name: sample_rows(rows, settings.max_tokens_per_set, seed)
                for name, rows in self.forget.items()
            },
            retain=sample_rows(self.retain, settings.max_tokens_per_set, seed),
            general=sample_rows(self.general, settings.max_tokens_per_set, seed),
        )
        substrate = initial_substrate(self.base, self.config, seed)
        passed = measure_text(self.base, substrate, text)
        with self.reporter.stage("entropy estimator", settings.estimator_steps) as stage:
            figures: dict[str, Any] = {
                "entropy_estimator": train_estimator(
                    substrate, passed, settings, seed=seed, stage=stage
                )
            }
        if is_learned(self.config, settings):
            substrate, joint = self._learn_shared(substrate, text, passed.entropy)
            figures["joint"] = joint
        substrate = dataclasses.replace(
            substrate,
            lora_a=rounded(substrate.lora_a, self.base.dtype),
            retain_lora_b=rounded(substrate.retain_lora_b, self.base.dtype),
            estimator=substrate.estimator.cpu(),
            embedding_mean=substrate.embedding_mean.cpu(),
            embedding_std=substrate.embedding_std.cpu(),
        )
        substrate.write(
            folder, name=SUBSTRATE_NAME, training=self._provenance(self.digests), evaluation=figures
        )
        self._done(SUBSTRATE_NAME, started, figures)
        return Substrate.read(folder, self.base.info)

    def _learn_shared(
        self, substrate: Substrate, text: SubstrateText, entropy: Sequence[Tensor]
    ) -> tuple[Substrate, Figures]:
        embeddings = normalised_embeddings(self.base, substrate)
        heads = {name: self._head(name, embeddings)[0] for name in self.forget}
        return train_joint(
            self.base,
            substrate,
            heads,
            text,
            entropy,
            self.settings.substrate_settings,
            seed=self.settings.seed,
            checkpoint=self._checkpoint(SUBSTRATE_NAME),
            run=self.key,
            reporter=self.reporter,
        )

    # --- experts ---

    def _expert(self, name: str, substrate: Substrate, embeddings: Tensor) -> Path:
        folder = self.settings.out / name
        if folder.exists():
            self._check_resumed(folder)
            self.evaluation[name] = dict(ForgetExpert.read(folder, substrate).evaluation or {})
            return folder
        started = time.monotonic()
        rows, settings = self.forget[name], self.settings.expert_settings
        head, calibration = self._head(name, embeddings)
        evidence_s = time.monotonic() - started
        entropy = cached_entropy(
            self.base,
            rows,
            tsallis_q=self.config.tsallis_q,
            tap_layer=self.config.tap_layer,
            folder=self.settings.out / _CACHE,
        )
        with self.reporter.stage(f"{name}: expert", settings.num_steps(len(rows))) as stage:
            expert, num_steps = train_expert(
                self.base,
                substrate,
                name,
                head,
                rows,
                entropy,
                self.counterfactuals,
                settings,
                seed=self._seed(name),
                checkpoint=self._checkpoint(name),
                run=self.key,
                stage=stage,
            )
        if self.config.router == "scalar":
            expert = dataclasses.replace(expert, scalar_weight=self._scalar_weight(entropy))
        trained_s = time.monotonic() - started
        figures = expert_figures(
            self.base,
            substrate,
            expert,
            embeddings,
            rows,
            self._negatives(name),
            num_asked=self.settings.evaluation_rows,
        )
        figures |= {"router_calibration": calibration, "num_steps": num_steps}
        figures["base_loss"] = self.base_loss[name]
        digests = {
            part: digest
            for part, digest in self.digests.items()
            if part in ("retain", "general", part_of(name)) or self.settings.auto_domains
        }
        expert.write(folder, substrate, training=self._provenance(digests), evaluation=figures)
        self._done(name, started, figures)
        self.timings_s[f"{name}/evidence"] = evidence_s
        self.timings_s[f"{name}/expert"] = trained_s - evidence_s
        return folder

    def _knowledge(self, name: str) -> dict[str, float]:
        """The base model's loss on a domain and on its counterfactual, nats per answer token.

        Raises: NothingToForgetError if they are alike.
        """
        rows = self.forget[name]
        others = counterfactual_rows(rows, self.counterfactuals, self._seed(name))
        losses = {
            "domain": mean(answer_losses(self.base, rows)),
            "counterfactual": mean(answer_losses(self.base, others)),
        }
        limit = _MAX_KNOWN_LOSS * losses["counterfactual"]
        if losses["domain"] > limit and not self.settings.allow_unknown:
            raise NothingToForgetError(
                f"The base model does not know domain {name!r}, so there is nothing to forget",
                expected=f"less than {limit:.2f} nats per answer token, as on text that it knows",
                got=f"{losses['domain']:.2f}",
                fix="Check the file and the model; --allow-unknown trains all the same.",
            )
        return losses

    def _head(self, name: str, embeddings: Tensor) -> tuple[EvidenceHead, dict[str, float]]:
        settings = self.settings.evidence_settings
        num_members = len(settings.units_by_member(self.config.evidence_units))
        num_steps = num_members * settings.scaled(self.forget[name]).num_steps
        with self.reporter.stage(f"{name}: evidence", num_steps) as stage:
            done = 0

            def progress(loss: float) -> None:
                nonlocal done
                done += 1
                stage.step(done, loss=loss)

            return train_evidence(
                embeddings,
                self.forget[name],
                [ids for texts in self._negatives(name).values() for ids in texts],
                self.base.tokenizer,
                self.config,
                settings,
                seed=self._seed(name),
                progress=progress,
            )

    def _negatives(self, name: str) -> dict[str, list[tuple[int, ...]]]:
        """What a domain's head must not fire on, by kind; the most important first."""
        others = [row for other, rows in self.forget.items() if other != name for row in rows]
        kinds = {"retain": self.retain, "other_domains": others, "general": self.general}
        return {kind: [row.ids for row in rows] for kind, rows in kinds.items() if rows}

    def _scalar_weight(self, entropy: Sequence[Tensor]) -> float:
        retain = cached_entropy(
            self.base,
            sample_rows(
                self.retain, self.settings.substrate_settings.max_tokens_per_set, self.settings.seed
            ),
            tsallis_q=self.config.tsallis_q,
            tap_layer=self.config.tap_layer,
            folder=self.settings.out / _CACHE,
        )
        return train_scalar_weight(torch.cat(list(entropy)), torch.cat(retain))

    # --- bookkeeping ---

    def _seed(self, name: str) -> int:
        """A seed of the domain's own, so that a domain comes out the same whatever it is trained beside."""
        digest = hashlib.sha256(f"{self.settings.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _checkpoint(self, name: str) -> Path:
        return self.settings.out / _CHECKPOINTS / f"{name}.safetensors"

    def _check_resumed(self, folder: Path) -> None:
        made_by = read_manifest(folder).training.settings.get(_RUN_KEY)
        if made_by != self.key:
            raise TrainingError(
                f"{folder} was made by another run",
                expected="the same data, settings and seed",
                got="others",
                fix="Repeat the first command with --resume, or choose another --out.",
            )

    def _done(self, name: str, started: float, figures: dict[str, Any]) -> None:
        self.timings_s[name] = time.monotonic() - started
        self.evaluation[name] = figures
        self.reporter.say(f"{name}: {self.timings_s[name]:.1f} s, {_summary(figures)}")

    def _provenance(self, digests: Mapping[str, DataDigest]) -> Provenance:
        return Provenance(
            method=METHOD,
            data=dict(digests),
            seed=self.settings.seed,
            settings={_RUN_KEY: self.key, **self.settings.flat()},
            versions=versions(),
        )

    def _write_run_file(self) -> Path:
        out = self.settings.out
        content = {
            "run": self.key,
            "model": self.base.info.model_dump(),
            "substrate": read_manifest(self.substrate_folder).digest,
            "experts": {name: read_manifest(out / name).digest for name in self.forget},
            "config": dataclasses.asdict(self.config),
            "settings": self.settings.flat(),
            "seed": self.settings.seed,
            "data": {name: digest.model_dump() for name, digest in self.digests.items()},
            "hardware": hardware(self.base),
            "versions": versions(),
            "timings_s": self.timings_s,
            "evaluation": self.evaluation,
            "finished_at": datetime.now(UTC).isoformat(),
        }
        path = _free_run_file(out, self.key)
        write_atomically(path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
        return path


def _free_run_file(out: Path, key: str) -> Path:
    """`run.json`; `run-2.json` and so on where runs before have left theirs."""
    number = 1
    while True:
        path = out / (RUN_FILE if number == 1 else f"run-{number}.json")
        try:
            if json.loads(path.read_bytes())["run"] == key:
                return path
        except FileNotFoundError:
            return path
        except (ValueError, KeyError, TypeError):
            pass  # not ours: leave it alone
        number += 1


def _summary(figures: dict[str, Any]) -> str:
    if "forget_probability" not in figures:
        estimator = figures["entropy_estimator"]
        auc = estimator["auc"]
        return f"entropy estimator AUC {'none' if auc is None else f'{auc:.3f}'}"
    probability, rouge = figures["forget_probability"], figures["rouge_l_recall"]
    shown = f"answer probability {probability['before']:.3f} -> {probability['after']:.3f}"
    if rouge["after"] is not None:
        shown += f", ROUGE-L {rouge['before']:.3f} -> {rouge['after']:.3f}"
    return shown + f", first tokens missed {figures['router']['first_token_missed']:.1%}"
