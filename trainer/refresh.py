"""One run of `alter train --refresh`: experts in, refreshed experts out, on the same substrate.

    out/NAME/    bundle, one per expert that there was something to refresh about

All are refreshed before any is written. What a refresh does is told in `recovery`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter_core.bundle import Provenance
from alter_core.errors import ConfigError
from alter_core.rows import data_digest
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import load_base_model
from .dataset import EncodedRow, encode_rows
from .evaluation import expert_figures
from .inputs import part_of, read_parts
from .progress import Reporter, SilentReporter
from .provenance import versions
from .recovery import Recovery, recover
from .settings import RefreshSettings
from .substrate import normalised_embeddings, on_device

METHOD = "alter-refresh"
OTHER_DOMAINS = "other_domains"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshResult:
    """What a run left behind."""

    experts: dict[str, Path]
    """The bundle to use, by domain: the one that was given where there was nothing to refresh."""
    figures: dict[str, dict[str, Any] | None]
    """See `recovery.Recovery`; None where there was nothing to refresh."""


def refresh_experts(settings: RefreshSettings, progress: Reporter | None = None) -> RefreshResult:
    """Refreshes experts, and writes them as new bundles that name the digest of the old.

    Raises: TrainingDataError, ConfigError, UnsupportedModelError, BundleError; TrainingError if forgetting
    would be lost or nothing be recovered, before anything is written.
    """
    return _Run(settings, progress or SilentReporter()).execute()


class _Run:
    def __init__(self, settings: RefreshSettings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        _check_names(settings)
        rows = read_parts(settings)
        self.digests = {part: data_digest(members) for part, members in rows.items()}
        self.base = load_base_model(
            settings.model, device=settings.device, mixed_precision=settings.mixed_precision
        )
        substrate = Substrate.read(settings.substrate, self.base.info)
        self.experts = _read_experts(settings.experts, substrate)
        self.substrate = on_device(substrate, self.base.device)
        max_tokens = min(settings.max_tokens, self.base.max_tokens)
        self.rows = {
            part: encode_rows(members, self.base.tokenizer, max_tokens=max_tokens)
            for part, members in rows.items()
        }

    def execute(self) -> RefreshResult:
        recovered = {name: self._recover(name) for name in self.experts}
        folders = {
            name: self._write(name, recovery) if recovery else self.settings.experts[name]
            for name, recovery in recovered.items()
        }
        return RefreshResult(
            experts=folders,
            figures={name: recovery and recovery.figures for name, recovery in recovered.items()},
        )

    def _recover(self, name: str) -> Recovery | None:
        settings, kept = self.settings, self._kept(name)
        with self.reporter.stage(f"{name}: refresh", settings.num_steps) as stage:
            recovery = recover(
                self.base,
                self.substrate,
                self.experts[name],
                self.rows[part_of(name)],
                kept,
                settings,
                stage,
            )
        self.reporter.say(f"{name}: {_summary(recovery, sum(map(len, kept.values())))}")
        return recovery

    def _kept(self, name: str) -> dict[str, Sequence[EncodedRow]]:
        """What a domain's expert is not to act on, by kind."""
        others = [
            row
            for other in self.settings.forget
            if other != name
            for row in self.rows[part_of(other)]
        ]
        kinds: dict[str, Sequence[EncodedRow]] = {
            "retain": self.rows["retain"],
            OTHER_DOMAINS: others,
            "general": self.rows.get("general", []),
        }
        return {kind: rows for kind, rows in kinds.items() if rows}

    def _write(self, name: str, recovery: Recovery) -> Path:
        folder = self.settings.out / name
        figures = expert_figures(
            self.base,
            self.substrate,
            recovery.expert,
            normalised_embeddings(self.base, self.substrate),
            self.rows[part_of(name)],
            {kind: [row.ids for row in rows] for kind, rows in self._kept(name).items()},
            num_asked=self.settings.evaluation_rows,
        )
        recovery.expert.write(
            folder,
            self.substrate,
            training=self._provenance(self.experts[name]),
            evaluation={**figures, "refresh": recovery.figures},
        )
        return folder

    def _provenance(self, refreshed: ForgetExpert) -> Provenance:
        return Provenance(
            method=METHOD,
            data=self.digests,
            seed=self.settings.seed,
            settings={"refresh.of": refreshed.digest, **self.settings.flat()},
            versions=versions(),
        )


def _check_names(settings: RefreshSettings) -> None:
    """Raises: ConfigError unless every expert has its domain's rows, and no output is in the way."""
    if not settings.experts:
        raise ConfigError(
            "There is nothing to refresh", expected="at least one --refresh NAME=DIR", got="none"
        )
    if lacking := [name for name in settings.experts if name not in settings.forget]:
        raise ConfigError(
            "A refresh needs the domain's own rows, to prove that they stay forgotten",
            expected=f"--forget {lacking[0]}=FILE.jsonl beside --refresh",
            got="rows of " + (", ".join(settings.forget) or "no domain"),
            fix="Give the file that the domain was trained on.",
        )
    taken = [settings.out / name for name in settings.experts if (settings.out / name).exists()]
    if taken:
        raise ConfigError(
            "There is output already",
            expected="no folder of that name",
            got=", ".join(map(str, taken)),
            fix="Choose another --out; bundles are immutable.",
        )


def _read_experts(folders: Mapping[str, Path], substrate: Substrate) -> dict[str, ForgetExpert]:
    """Raises: BundleError; ConfigError for another domain's expert, or a router without evidence."""
    if substrate.config.router != "evidence":
        raise ConfigError(
            "Only experts behind an evidence router can be refreshed",
            expected="a substrate with the router `evidence`",
            got=substrate.config.router,
        )
    experts = {name: ForgetExpert.read(folder, substrate) for name, folder in folders.items()}
    for name, expert in experts.items():
        if expert.name != name:
            raise ConfigError(
                "An expert is another domain's than its rows",
                expected=f"the bundle of {name!r}",
                got=f"that of {expert.name!r}",
                fix="Write --refresh and --forget under the bundle's own name.",
            )
    return experts


def _summary(recovery: Recovery | None, num_kept: int) -> str:
    if recovery is None:
        return f"nothing to refresh, the expert acts on none of {num_kept} kept rows"
    figures = recovery.figures
    parts = [
        f"{kind}: false alarms {found['false_alarms']['before']:.1%} -> "
        f"{found['false_alarms']['after']:.1%} of rows, their loss {found['loss']['before']:.3f} -> "
        f"{found['loss']['after']:.3f} (base {found['loss']['base']:.3f})"
        for kind, found in figures["kept"].items()
    ]
    loss = figures["forget_loss"]
    parts.append(
        f"forget loss {loss['before']:.3f} -> {loss['after']:.3f} (base {loss['base']:.3f})"
    )
    return "; ".join(parts)
