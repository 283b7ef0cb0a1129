"""Interference between forget experts of one substrate: what one does to another's text, routes and sites.

The questions are those of "A Local Perturbation Theory for Cross-Domain Interference and Recovery in
Multi-Domain RL" (2026, abstract): edits of different domains overlap little in the weights they change, and
yet interfere where the domains share active routes, by the directions of their updates. So routes and
directions are measured apart, and neither is taken for harm: harm is what the answers' losses show. Where the
paper asks which neurons are active, a gate that routes token by token is simply read.

Legend: N domains, E experts attached, A answer tokens, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alter_core.attach import AttachedModel
from alter_core.substrate import ForgetExpert, Substrate
from trainer.base_model import BaseModel
from trainer.batches import IGNORED, by_length, make_batch
from trainer.dataset import EncodedRow
from trainer.domains import pooled_states
from trainer.evaluation import attached_experts
from trainer.losses import answer_nll
from trainer.progress import Reporter

from .metrics import Values
from .site_overlap import SiteOverlap, site_overlap

Flags = NDArray[np.bool_]

_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harm:
    """What expert i, active alone, does to text of domain j. Shapes: (N, N), [i, j].

    Changes are from the model with the substrate and no expert, which is the base model exactly unless the
    substrate has a trained retain expert.
    """

    loss_change: Values
    """Of the mean answer loss, nats per token."""
    probability_change: Values
    """Of the mean answer probability, exp(-loss) of every row."""
    routed_share: Values
    """Share of answer tokens that are predicted by the expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Each domain's mean answer loss on its own rows, nats per token. Shapes: (N,)."""

    without: Values
    """With no expert."""
    alone: Values
    """With its own."""
    together: Values
    """With all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conflict:
    """A loss, nats per answer token, beyond the threshold.

    `rows`, `neighbours`: what `expert`, alone, adds to the loss of that text of `domain`.
    `forgetting`: what all experts together take from the loss that `domain`'s own, alone, makes.
    """

    on: Literal["rows", "neighbours", "forgetting"]
    expert: str | None
    """None for all the others."""
    domain: str
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interference:
    """All that is measured."""

    names: tuple[str, ...]
    on_rows: Harm
    on_neighbours: Harm | None
    """None without retained text."""
    forgetting: Forgetting
    route_overlap: Values
    """Share of the tokens of both domains' rows at which both heads' evidence is positive; on the diagonal,
    of the domain's rows and its head. Shapes: (N, N), symmetric."""
    sites: SiteOverlap

    def conflicts(self, threshold: float) -> list[Conflict]:
        """All above a threshold, worst first. An expert is meant to raise the loss of its own rows."""
        found = []
        for i, expert in enumerate(self.names):
            for j, domain in enumerate(self.names):
                if i != j:
                    loss = float(self.on_rows.loss_change[i, j])
                    found.append(Conflict(on="rows", expert=expert, domain=domain, loss=loss))
                if self.on_neighbours is not None:
                    loss = float(self.on_neighbours.loss_change[i, j])
                    found.append(Conflict(on="neighbours", expert=expert, domain=domain, loss=loss))
        weakened = self.forgetting.alone - self.forgetting.together
        for domain, loss in zip(self.names, weakened.tolist(), strict=True):
            found.append(Conflict(on="forgetting", expert=None, domain=domain, loss=loss))
        above = [conflict for conflict in found if conflict.loss > threshold]
        return sorted(above, key=lambda conflict: -conflict.loss)


def measure_interference(
    base: BaseModel,
    substrate: Substrate,
    experts: Mapping[str, ForgetExpert],
    rows: Mapping[str, Sequence[EncodedRow]],
    neighbours: Mapping[str, Sequence[EncodedRow]] | None,
    reporter: Reporter,
) -> Interference:
    """Reads every domain's rows and retained neighbours with no expert, each alone, and all together.

    N + 2 passes over the text.
    """
    names = tuple(experts)
    sets = [rows[name] for name in names]
    if neighbours is not None:
        sets += [neighbours[name] for name in names]
    casts = [[], *([expert] for expert in experts.values()), list(experts.values())]
    readings = []
    with reporter.stage("interference", len(casts)) as stage:
        for done, cast in enumerate(casts, start=1):
            with attached_experts(base, substrate, cast) as attached:
                readings.append([_read(base, attached, members) for members in sets])
            stage.step(done)
    without, *alone, together = readings
    size = len(names)
    own = [alone[place][place] for place in range(size)]
    return Interference(
        names=names,
        on_rows=_harm(without[:size], [found[:size] for found in alone]),
        on_neighbours=_harm(without[size:], [found[size:] for found in alone])
        if neighbours is not None
        else None,
        forgetting=Forgetting(
            without=_mean_losses(without[:size]),
            alone=_mean_losses(own),
            together=_mean_losses(together[:size]),
        ),
        route_overlap=_route_overlap([found.has_evidence for found in together[:size]]),
        sites=site_overlap(substrate, list(experts.values())),
    )


def nearest_rows(
    base: BaseModel,
    rows: Mapping[str, Sequence[EncodedRow]],
    retain: Sequence[EncodedRow],
    *,
    tap_layer: int,
    count: int,
) -> dict[str, list[EncodedRow]]:
    """Each domain's retain neighbours: the `count` retained rows most like its rows on average.

    By cosine similarity of mean hidden states at the tap layer, centred over all rows.
    """
    every = [row for members in (*rows.values(), retain) for row in members]
    counts = [len(members) for members in (*rows.values(), retain)]
    *of_domains, of_retain = pooled_states(base, every, tap_layer=tap_layer).split(counts)
    nearest = {}
    for name, states in zip(rows, of_domains, strict=True):
        order = (of_retain @ states.mean(dim=0)).argsort(descending=True, stable=True)
        nearest[name] = [retain[index] for index in order[:count].tolist()]
    return nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """A set of rows under some experts."""

    losses: Values
    """Of each row's answer."""
    is_routed: Flags
    """Shape: (A, E)."""
    has_evidence: Flags
    """Shape: (T, E)."""


@torch.inference_mode()
def _read(base: BaseModel, attached: AttachedModel, rows: Sequence[EncodedRow]) -> _Reading:
    losses, is_routed, has_evidence = np.zeros(len(rows)), [], []
    for indices in by_length(rows, _BATCH_TOKENS):
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        losses[indices] = answer_nll(base.logits(batch), batch.labels).cpu().numpy()
        routing = attached.routing
        assert routing is not None
        is_routed.append((routing.weights[..., 1:] > 0)[batch.labels != IGNORED])
        has_evidence.append((routing.domain_logits > 0)[batch.attention_mask.bool()])
    return _Reading(
        losses=losses,
        is_routed=torch.cat(is_routed).cpu().numpy(),
        has_evidence=torch.cat(has_evidence).cpu().numpy(),
    )


def _mean_losses(readings: Sequence[_Reading]) -> Values:
    return np.array([found.losses.mean() for found in readings])


def _harm(without: Sequence[_Reading], alone: Sequence[Sequence[_Reading]]) -> Harm:
    """From what was read of every domain's text, without experts and with each alone."""
    pairs = [list(zip(without, found, strict=True)) for found in alone]

    def matrix(figure: Callable[[_Reading, _Reading], float]) -> Values:
        return np.array([[figure(before, after) for before, after in by] for by in pairs])

    return Harm(
        loss_change=matrix(lambda before, after: (after.losses - before.losses).mean()),
        probability_change=matrix(
            lambda before, after: (np.exp(-after.losses) - np.exp(-before.losses)).mean()
        ),
        routed_share=matrix(lambda _, after: after.is_routed.mean()),
    )


def _route_overlap(has_evidence: Sequence[Flags]) -> Values:
    """From the evidence at each domain's tokens. Shapes: N times (T, N) -> (N, N)."""
    size = len(has_evidence)
    overlap = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            tokens = np.concatenate([has_evidence[place] for place in {i, j}])
            overlap[i, j] = (tokens[:, i] & tokens[:, j]).mean()
    return overlap
