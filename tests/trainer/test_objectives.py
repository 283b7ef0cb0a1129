"""Objectives with learned token weights: against loops over tokens in double precision, and as they go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from trainer import ExpertSettings, TrainResult
from trainer.atwu import TokenScorer
from trainer.base_model import BaseModel
from trainer.batches import at_step, make_batch
from trainer.checkpoint import Checkpoint
from trainer.counterfactual import Counterfactuals
from trainer.dataset import encode_rows
from trainer.evaluation import answer_losses
from trainer.experts import ExpertTraining, select_answer_tokens
from trainer.objectives import CounterfactualDistillation, TokenPush

from .world import World

LOSSES = ("counterfactual", "ihl", "capped")
CHOSEN = [5, 0, 3]
CAP, TEMPERATURE, LEVEL_WEIGHT = 2.0, 0.8, 1.7
HALFWAY = 0.02
"""Scale of a B_f under which the domain is half forgotten."""
LESS_THAN_HALF = -0.75
Training = Callable[..., ExpertTraining]


@pytest.fixture(scope="module")
def make_training(world: World, base: BaseModel, trained: TrainResult) -> Training:
    """Begins the training of the red domain's expert anew, on all answer tokens."""
    substrate = Substrate.read(trained.substrate, base.info)
    head = ForgetExpert.read(trained.experts["red"], substrate).evidence
    encoded = {
        part: encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)
        for part in ("red", "retain", "general")
    }
    rows = encoded.pop("red")
    texts = [row.ids for part in encoded.values() for row in part]
    counterfactuals = Counterfactuals(base.tokenizer, texts, kept_share=0.01)

    def make(**settings: float | str) -> ExpertTraining:
        chosen = ExpertSettings(**settings)  # type: ignore[arg-type]
        entropy = [torch.full((len(row.ids),), 9.0) for row in rows]
        selected = select_answer_tokens(rows, entropy, 1.2, chosen)
        return ExpertTraining(
            base, substrate, "red", head, rows, selected, counterfactuals, chosen, seed=3
        )

    return make


@pytest.fixture
def begin(make_training: Training) -> Iterator[Training]:
    """The same, one at a time, with hooks removed."""
    begun: list[ExpertTraining] = []

    def close() -> None:
        while begun:
            begun.pop().close()

    def make(**settings: float | str) -> ExpertTraining:
        close()
        begun.append(make_training(**settings))
        return begun[-1]

    yield make
    close()


def _scorer(training: ExpertTraining) -> TokenScorer:
    assert isinstance(training.objective, TokenPush | CounterfactualDistillation)
    assert training.objective.scorer is not None
    return training.objective.scorer


def _move_away_from_zero(
    training: ExpertTraining, *, scale: float = HALFWAY
) -> tuple[Tensor, float]:
    """Gives B_f and the scorer values; returns v and c."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for lora_b in training.lora_b.values():
            lora_b.copy_(scale * torch.randn(lora_b.shape, generator=generator))
    weight = torch.randn(1, training.base.info.hidden_size, generator=generator)
    bias = torch.tensor([0.3])
    _scorer(training).restore({"atwu.weight": weight, "atwu.bias": bias})
    return weight[0].double(), bias.item()


def _push(name: str, logits: Tensor, token: int) -> Tensor:
    """A token's loss under `ihl` or `capped`. Shape: (V,) -> ()."""
    probability = logits.exp() / logits.exp().sum()
    if name == "capped":
        nll = -probability[token].log()
        return -nll if nll < CAP else torch.tensor(-CAP, dtype=torch.float64)
    return 1 + probability[token] - max(p for v, p in enumerate(probability) if v != token)


def _distil(training: ExpertTraining, index: int, place: int, logits: Tensor) -> Tensor:
    """KL from the target and the distance from the level, of the `place`-th answer token of a row."""
    objective = training.objective
    assert isinstance(objective, CounterfactualDistillation)
    lesson = objective.truths[index]
    level = objective.levels[index][place].item()
    at = [t for t, is_answer in enumerate(lesson.row.is_answer) if is_answer and t > 0][place]
    own, stand_in = lesson.row.ids[at], lesson.target.ids[at]
    with torch.no_grad():
        told = (training.base.head(lesson.hidden)[place].double() / TEMPERATURE).softmax(dim=0)
    told[[own, stand_in]] = told[[stand_in, own]]
    pair = {own, stand_in}
    given = math.exp(level if len(pair) == 1 else min(level, LESS_THAN_HALF))
    rest = (1 - given * len(pair)) / (1 - sum(told[v].item() for v in pair))
    target = torch.tensor(
        [given if v in pair else p * rest for v, p in enumerate(told.tolist())],
        dtype=torch.float64,
    )
    found = logits - logits.exp().sum().log()
    divergence = (target * (target.log() - found)).sum()
    gap = (found[own] - level).abs()
    return divergence + LEVEL_WEIGHT * (gap**2 / 2 if gap < 4 else 4 * (gap - 2))


def _reference(
    training: ExpertTraining, name: str, weight: Tensor, bias: float
) -> tuple[Tensor, Tensor, list[float]]:
    """The weighted mean over the chosen rows' tokens, the plain one, and the weights."""
    base, rows = training.base, training.rows
    batch = make_batch(rows, CHOSEN, base.pad_id)
    hidden = base.hidden_states(batch)
    logits = base.head(hidden).double()
    losses, weights = [], []
    for row, index in enumerate(CHOSEN):
        answers = [t for t, is_answer in enumerate(rows[index].is_answer) if is_answer]
        for place, t in enumerate(answers):
            score = sum((weight * hidden[row, t - 1].detach().double()).tolist()) + bias
            weights.append(1 / (1 + math.exp(-score)))
            if name == "counterfactual":
                losses.append(_distil(training, index, place, logits[row, t - 1]))
            else:
                losses.append(_push(name, logits[row, t - 1], rows[index].ids[t]))
    weighted = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert isinstance(weighted, Tensor)
    return weighted, torch.stack(losses).mean(), weights


@pytest.mark.parametrize("name", LOSSES)
def test_weighted_loss_and_its_gradient_equal_a_loop_over_tokens(
    begin: Training, name: str
) -> None:
    training = begin(
        forget_loss=name,
        entropy_mask="atwu",
        forget_cap=CAP,
        temperature=TEMPERATURE,
        level_weight=LEVEL_WEIGHT,
        answer_weight=0.0,
        others_weight=0.0,
    )
    weight, bias = _move_away_from_zero(training)
    expected, plain, weights = _reference(training, name, weight, bias)
    assert min(weights) < 0.1
    assert max(weights) > 0.9
    assert abs(expected.item() - plain.item()) > 0.02 * abs(plain.item())
    found = training.objective(CHOSEN).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = list(training.lora_b.values())
    for one, other in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_first_step_is_that_of_equal_weights_and_later_ones_are_not(
    begin: Training, name: str
) -> None:
    found = {}
    for mask in ("none", "atwu"):
        training = begin(forget_loss=name, entropy_mask=mask)
        found[mask] = [training.step(step) for step in range(4)]
    assert found["atwu"][0] == pytest.approx(found["none"][0], rel=1e-5)
    assert found["atwu"][3] != pytest.approx(found["none"][3], rel=1e-5)


def test_weights_move_apart_and_towards_the_budget(begin: Training) -> None:
    training = begin(entropy_mask="atwu")
    for step in range(25):
        training.step(step)
    indices = at_step(training.rows, 8, 0, training.seed)
    batch = make_batch(training.rows, indices, training.base.pad_id)
    with torch.no_grad():
        hidden = training.base.hidden_states(batch)[batch.labels >= 0]
        weights = _scorer(training).linear(hidden.float()).sigmoid()
    assert weights.std() > 0.02
    assert 0.2 < weights.mean() < 0.45


@pytest.mark.parametrize("name", LOSSES)
def test_scorer_goes_on_from_a_checkpoint_bit_by_bit(
    begin: Training, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "red.safetensors"
    training = begin(forget_loss=name, entropy_mask="atwu")
    for step in range(5):
        if step == 2:
            training.checkpoint(step).write(file, "key")
        training.step(step)
    whole = {key: value.clone() for key, value in training.checkpoint(5).tensors.items()}
    assert whole["atwu.weight"].any()
    resumed = begin(forget_loss=name, entropy_mask="atwu")
    for step in range(resumed.restore(Checkpoint.read(file, "key")), 5):
        resumed.step(step)
    found = resumed.checkpoint(5).tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], value) for key, value in whole.items())


def test_what_is_left_to_scale_counts_every_answer_token_once(begin: Training) -> None:
    training = begin(entropy_mask="atwu")
    objective = training.objective
    assert isinstance(objective, CounterfactualDistillation)
    num_tokens = [len(level) for level in objective.levels]
    expected = sum(
        -loss * number - level.sum().item()
        for loss, number, level in zip(
            answer_losses(training.base, training.rows), num_tokens, objective.levels, strict=True
        )
    ) / sum(num_tokens)
    for _ in range(2):
        assert objective.excess() == pytest.approx(expected, rel=1e-2)
        _move_away_from_zero(training, scale=0.0)
