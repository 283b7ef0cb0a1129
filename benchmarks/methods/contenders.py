"""Everything that is compared, and what using it commits an operator to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from alter_core.errors import ConfigError
from trainer.methods import LoraAdapter

EPOCHS = 5
"""How often every forgotten row is seen; one figure for all, ALTER's experts apart."""
_FULL_RATE, _BOUNDED_RATE = 1e-4, 4e-4
_ADAPTER_RATE = 3e-3
"""Where searches begin: rates that move a model of 5 million parameters, far above those of the papers.
Losses that are bounded bear a higher one."""
_BETA, _SIMNPO_BETA = 0.03, 0.7
"""Of NPO and DPO, and of SimNPO; the papers' 0.1 and 2.5 stop pushing at 2 nats a token, where a model that
never learned the rows has 6."""
Served = Literal["base", "lora", "alter", "eco"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to unlearn."""

    is_revocable: bool
    """Whether the served model can be had back without another checkpoint and a restart."""
    is_composable: bool
    """Whether two that were trained apart can be in force at once."""
    served: Served
    """What it is served as: another checkpoint costs what the base model costs."""
    is_ablation: bool = False
    """Whether it varies another row of the table, and is measured on TOFU alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Contender):
    """A loss that trains all weights or an adapter; its learning rate is searched for."""

    method: str
    rate: float = _FULL_RATE
    adapter: LoraAdapter | None = None
    weighting: str = "uniform"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Hyper-parameters that differ from the paper's, each with its reason in CONTENDERS."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alter(Contender):
    """A forget expert, with the defaults of `alter train`: nothing is searched for."""

    mask: Literal["threshold", "none", "atwu", "spans"] = "threshold"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eco(Contender):
    """Corrupted prompts; the strength is searched for, as the method has it."""


def _full(method: str, *, rate: float = _FULL_RATE, **settings: Any) -> Gradient:
    return Gradient(
        method=method,
        rate=rate,
        settings=settings,
        is_revocable=False,
        is_composable=False,
        served="base",
    )


def _adapted(method: str, adapter: LoraAdapter, **settings: Any) -> Gradient:
    return Gradient(
        method=method,
        rate=_ADAPTER_RATE,
        adapter=adapter,
        is_ablation=method != "elm",
        settings=settings,
        is_revocable=True,
        is_composable=False,
        served="lora",
    )


def _weighted(weighting: str) -> Gradient:
    return dataclasses.replace(_full("grad_diff"), weighting=weighting, is_ablation=True)


def _alter(mask: Literal["threshold", "none", "atwu", "spans"]) -> Alter:
    return Alter(
        mask=mask,
        is_ablation=mask != "threshold",
        is_revocable=True,
        is_composable=True,
        served="alter",
    )


_LORA, _ASYMLORA = LoraAdapter(), LoraAdapter(a_rate_ratio=0.01)

CONTENDERS: dict[str, Contender] = {
    "alter": _alter("threshold"),
    "grad_ascent": _full("grad_ascent"),
    "grad_diff": _full("grad_diff"),
    "kl_min": _full("kl_min"),
    "random_label": _full("random_label"),
    "npo": _full("npo", rate=_BOUNDED_RATE, beta=_BETA),
    "npo_gd": _full("npo_gd", rate=_BOUNDED_RATE, beta=_BETA),
    "npo_kl": _full("npo_kl", rate=_BOUNDED_RATE, beta=_BETA),
    "simnpo": _full("simnpo", rate=2e-4, beta=_SIMNPO_BETA),
    "idk_dpo": _full("idk_dpo", rate=_BOUNDED_RATE, beta=_BETA),
    "rmu": _full("rmu", rate=4e-3, layer=2, retain_weight=1.0, steering_coefficient=20.0),
    "whp": _full("whp", rate=_BOUNDED_RATE, reinforce_learning_rate=1e-3),
    "elm": _adapted("elm", LoraAdapter(rank=4), written_tokens=32, eta=50.0, fluency_weight=0.3),
    "lora_npo_gd": _adapted("npo_gd", _LORA, beta=_BETA),
    "lora_ihl": _adapted("ihl", _LORA),
    "asymlora_npo_gd": _adapted("npo_gd", _ASYMLORA, beta=_BETA),
    "asymlora_ihl": _adapted("ihl", _ASYMLORA),
    "eco": Eco(is_revocable=True, is_composable=True, served="eco"),
    "grad_diff_entropy": _weighted("entropy"),
    "grad_diff_atwu": _weighted("atwu"),
    "grad_diff_spans": _weighted("knowledge_spans"),
    "alter_uniform": _alter("none"),
    "alter_atwu": _alter("atwu"),
    "alter_spans": _alter("spans"),
}
QUICK = ("alter", "grad_diff", "npo_gd", "eco")


def named(names: str) -> dict[str, Contender]:
    """Contenders of a comma-separated list. Raises: ConfigError naming the known ones."""
    chosen = [name for name in names.split(",") if name]
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise ConfigError(
            f"{unknown[0]} is no method of this table",
            expected=", ".join(CONTENDERS),
            got=unknown[0],
        )
    return {name: CONTENDERS[name] for name in chosen}
