"""Eq. 8 on the small world: which term may move which parameter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alter_core.config import AlterConfig
from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.rows import read_rows
from trainer import SilentReporter, SubstrateSettings
from trainer.base_model import BaseModel, load_base_model
from trainer.batches import sample_rows
from trainer.checkpoint import Checkpoint
from trainer.dataset import encode_rows
from trainer.joint import JointTraining, train_joint
from trainer.losses import isolated_gradients
from trainer.substrate import SubstrateText, initial_substrate, measure_text

from .world import World

DOMAINS = ("red", "blue")


@pytest.fixture(scope="module")
def eager_base(world: World) -> BaseModel:
    return load_base_model(world.model, device="cpu", has_double_backward=True)


def _always_firing(config: AlterConfig, size: int) -> EvidenceHead:
    head = EvidenceHead(size, ngram=config.evidence_ngram, num_units=config.evidence_units)
    with torch.no_grad():
        head.fc2.bias.fill_(1e3)
    return head.requires_grad_(False)


def _never_firing(config: AlterConfig, size: int) -> EvidenceHead:
    head = _always_firing(config, size)
    with torch.no_grad():
        head.fc2.bias.fill_(-1e3)
    return head


def _text(world: World, base: BaseModel) -> SubstrateText:
    rows = {
        part: encode_rows(read_rows([path]), base.tokenizer, max_tokens=128)
        for part, path in world.files.items()
    }
    return SubstrateText(
        forget={name: rows[name] for name in DOMAINS},
        retain=sample_rows(rows["retain"], 150, seed=0),
        general=rows["general"],
    )


def _parts(world: World, base: BaseModel, **substrate_settings: Any) -> tuple[Any, ...]:
    # A low threshold puts tokens on both sides of it, on a world known by heart.
    config = AlterConfig(
        tap_layer=1, rank=3, retain_expert="trained", entropy_threshold=0.05, evidence_units=7
    )
    text = _text(world, base)
    substrate = initial_substrate(base, config, seed=0)
    entropy = measure_text(base, substrate, text).entropy
    size = base.info.hidden_size
    # The first domain's expert is routed to everywhere; the second's nowhere, so retained rows reach B_r.
    heads = {"red": _always_firing(config, size), "blue": _never_firing(config, size)}
    return base, substrate, heads, text, entropy, SubstrateSettings(**substrate_settings)


@pytest.fixture
def joint(world: World, eager_base: BaseModel, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    parts = _parts(world, eager_base, structure_weight=0.01, a_gradient=request.param)
    training = JointTraining(*parts, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from B = 0, where A has no influence at all
        for parameter in training.parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    yield training
    training.attached.detach()


def _groups(training: JointTraining) -> dict[str, list[Tensor]]:
    return {
        "a": list(training.lora_a.values()),
        "retain": list(training.retain_lora_b.values()),
        "red": list(training.experts["red"].lora_b.values()),
        "blue": list(training.experts["blue"].lora_b.values()),
    }


def _reached(training: JointTraining, term: Any) -> set[str]:
    gradients = isolated_gradients([term])
    groups = _groups(training)
    known = {id(parameter) for members in groups.values() for parameter in members}
    assert all(id(parameter) in known for parameter in gradients)
    return {
        name
        for name, members in groups.items()
        if any(p in gradients and bool(gradients[p].any()) for p in members)
    }


@pytest.mark.parametrize(
    ("joint", "expected"),
    [
        (
            "high_entropy",
            {
                "forget": {"red"},
                "retain": {"retain"},
                "high_entropy": {"a"},
                "structure": {"a"},
            },
        ),
        ("undetached", {"forget": {"red", "a"}, "retain": {"retain", "a"}, "structure": {"a"}}),
    ],
    indirect=["joint"],
)
def test_every_term_reaches_exactly_the_parameters_it_may(
    joint: JointTraining, expected: dict[str, set[str]]
) -> None:
    """Red's head fires everywhere, so retained rows pass through its B, which may not learn from them."""
    assert {term.name: _reached(joint, term) for term in joint.terms(0)} == expected


@pytest.mark.parametrize("joint", ["high_entropy"], indirect=True)
def test_retain_loss_moves_the_retain_expert_alone(joint: JointTraining) -> None:
    size, config = joint.base.info.hidden_size, joint.substrate.config
    quiet = dataclasses.replace(joint.experts["red"], evidence=_never_firing(config, size))
    joint.attached.experts[0] = joint.experts["red"] = quiet
    reached = {term.name: _reached(joint, term) for term in joint.terms(0)}
    assert reached["retain"] == {"retain"}
    assert reached["forget"] == set()


def test_without_a_gradient_on_a_it_stays_as_drawn(world: World, base: BaseModel) -> None:
    parts = _parts(world, base)
    training = JointTraining(*parts, 0)
    before = {site: tensor.clone() for site, tensor in parts[1].lora_a.items()}
    for step in range(2):
        training.step(step)
    training.attached.detach()
    assert all(torch.equal(training.lora_a[site], before[site]) for site in before)
    assert any(bool(tensor.any()) for tensor in training.experts["red"].lora_b.values())


def _train_joint(
    world: World, base: BaseModel, checkpoint: Path, *, steps: int
) -> dict[str, Tensor]:
    parts = _parts(world, base, a_gradient="high_entropy", learning_rate_a=1e-3, joint_steps=steps)
    substrate, figures = train_joint(
        *parts,
        seed=0,
        checkpoint=checkpoint,
        run="key",
        reporter=SilentReporter(),
    )
    assert set(figures) == {"forget", "retain", "high_entropy"}
    return {**substrate.lora_a, **{f"r.{s}": t for s, t in substrate.retain_lora_b.items()}}


def test_resumed_substrate_equals_an_uninterrupted_one(
    world: World, base: BaseModel, tmp_path: Path
) -> None:
    whole = _train_joint(world, base, tmp_path / "whole.safetensors", steps=24)
    _train_joint(world, base, tmp_path / "cut.safetensors", steps=20)
    stored = Checkpoint.read(tmp_path / "cut.safetensors", "key")
    assert stored is not None
    assert stored.step == 20
    resumed = _train_joint(world, base, tmp_path / "cut.safetensors", steps=24)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_loss_that_is_not_finite_stops_with_its_step(world: World, base: BaseModel) -> None:
    training = JointTraining(*_parts(world, base), 0)
    with torch.no_grad():
        next(iter(training.experts["red"].lora_b.values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 6"):
        training.step(6)
    training.attached.detach()
