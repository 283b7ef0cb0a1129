from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alter_core.attach import AttachedModel
from alter_core.errors import TrainingError
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from trainer import ExpertSettings, SilentReporter, TrainResult
from trainer.base_model import BaseModel
from trainer.checkpoint import Checkpoint
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import answer_losses, greedy_rouge_l, mean, mean_probability
from trainer.experts import ExpertTraining, select_answer_tokens, train_expert

from .world import FORM_ALONE, World


@pytest.fixture(scope="module")
def substrate(base: BaseModel, trained: TrainResult) -> Substrate:
    return Substrate.read(trained.substrate, base.info)


@pytest.fixture(scope="module")
def expert(substrate: Substrate, trained: TrainResult) -> ForgetExpert:
    return ForgetExpert.read(trained.experts["red"], substrate)


def _rows(world: World, base: BaseModel, part: str = "red") -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)


@pytest.fixture(scope="module")
def counterfactuals(world: World, base: BaseModel) -> Counterfactuals:
    texts = [row.ids for part in ("retain", "general") for row in _rows(world, base, part)]
    return Counterfactuals(base.tokenizer, texts, kept_share=0.01)


def _training(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    **settings: float | int | str,
) -> ExpertTraining:
    rows = _rows(world, base)
    return ExpertTraining(
        base,
        substrate,
        "red",
        expert.evidence,
        rows,
        [torch.tensor(row.is_answer) for row in rows],
        counterfactuals,
        ExpertSettings(**settings),  # type: ignore[arg-type]
        seed=3,
    )


@pytest.mark.parametrize("loss", ["counterfactual", "ihl", "capped"])
def test_forget_loss_moves_the_domain_expert_and_nothing_else(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    loss: str,
) -> None:
    training = _training(world, base, substrate, expert, counterfactuals, forget_loss=loss)
    frozen = {
        **dict(base.model.named_parameters()),
        **{f"a.{site}": tensor for site, tensor in substrate.lora_a.items()},
        **{f"e.{name}": tensor for name, tensor in substrate.estimator.named_parameters()},
        **{f"h.{name}": tensor for name, tensor in expert.evidence.named_parameters()},
    }
    before = {name: tensor.detach().clone() for name, tensor in frozen.items()}
    training.step(0)
    training.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in frozen.values())
    assert all(bool(tensor.any()) for tensor in training.lora_b.values())


@pytest.mark.parametrize("steps", [2, 20, 60])
def test_what_steps_leave_undone_is_made_up_for_within_bounds(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    steps: int,
) -> None:
    training = _training(world, base, substrate, expert, counterfactuals)
    for step in range(steps):
        training.step(step)
    excess = training.objective.excess()
    lora_b = {site: tensor.detach().clone() for site, tensor in training.lora_b.items()}
    training.settle()
    left = training.objective.excess()
    training.close()
    (scale, *others) = (
        (training.lora_b[site].norm() / before.norm()).item() for site, before in lora_b.items()
    )
    assert others == pytest.approx([scale] * len(others))
    assert 0.9 <= scale <= 1.1 + 1e-6
    assert abs(left) < abs(excess)
    assert abs(left) < max(abs(excess) / 2, 0.02) or scale > 1.099


@pytest.mark.parametrize("loss", ["ihl", "capped"])
def test_token_losses_forget_too_and_know_when_to_stop(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    loss: str,
) -> None:
    training = _training(world, base, substrate, expert, counterfactuals, forget_loss=loss)
    step = 0
    while not training.is_done(step):
        training.step(step)
        step += 1
    probability = mean_probability(answer_losses(base, training.rows))
    training.close()
    assert probability < 0.15
    assert step < training.num_steps


def test_tokens_are_selected_by_their_own_entropy() -> None:
    rows = [
        EncodedRow(ids=(1, 2, 3, 4), is_answer=(False, True, True, True)),
        EncodedRow(ids=(5, 6), is_answer=(False, True)),
    ]
    entropy = [torch.tensor([0.0, 0.1, 1.9, 0.2]), torch.tensor([0.0, 1.8])]

    def selected(**settings: float | str) -> list[list[bool]]:
        masks = select_answer_tokens(rows, entropy, 1.2, ExpertSettings(**settings))  # type: ignore[arg-type]
        return [mask.tolist() for mask in masks]

    assert selected() == [[False, True, False, True], [False, False]]
    for mask in ("none", "atwu"):
        assert selected(entropy_mask=mask) == [[False, True, True, True], [False, True]]
    half = selected(entropy_mask="quantile", entropy_quantile=0.25)
    assert half == [[False, True, False, False], [False, False]]
    with pytest.raises(TrainingError, match="low entropy"):
        select_answer_tokens(rows, [e + 5 for e in entropy], 1.2, ExpertSettings())


class _Poison:
    """A stage that spoils the expert's weights after some steps."""

    def __init__(self, training_patch: list[ExpertTraining], at: int) -> None:
        self.trainings, self.at = training_patch, at

    def step(self, completed: int, **_: float) -> None:
        if completed == self.at:
            with torch.no_grad():
                next(iter(self.trainings[0].lora_b.values())).fill_(float("nan"))


def test_nan_stops_training_and_keeps_the_last_good_checkpoint(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainings: list[ExpertTraining] = []
    real = ExpertTraining.__init__

    def note(self: ExpertTraining, *args: object, **kwargs: object) -> None:
        trainings.append(self)
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertTraining, "__init__", note)
    rows = _rows(world, base)
    path = tmp_path / "red.safetensors"
    with pytest.raises(TrainingError, match=r"'red' is not finite at step 5"):
        train_expert(
            base,
            substrate,
            "red",
            expert.evidence,
            rows,
            [torch.zeros(len(row.ids)) for row in rows],
            counterfactuals,
            ExpertSettings(checkpoint_every=3),
            seed=3,
            checkpoint=path,
            run="key",
            stage=_Poison(trainings, at=5),
        )
    stored = Checkpoint.read(path, "key")
    assert stored is not None
    assert stored.step == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.tensors.values())


def test_expert_that_is_never_routed_to_is_refused(
    world: World,
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    counterfactuals: Counterfactuals,
    tmp_path: Path,
) -> None:
    rows = _rows(world, base, "retain")  # red's head does not fire on them
    with pytest.raises(TrainingError, match="never routed"), SilentReporter().stage("", 2) as stage:
        train_expert(
            base,
            substrate,
            "red",
            expert.evidence,
            rows,
            [torch.zeros(len(row.ids)) for row in rows],
            counterfactuals,
            ExpertSettings(epochs=1, min_steps=0),
            seed=3,
            checkpoint=tmp_path / "red.safetensors",
            run="key",
            stage=stage,
        )


def test_experts_trained_apart_compose_and_leave_the_rest_alone(
    world: World, base: BaseModel, substrate: Substrate, trained: TrainResult
) -> None:
    experts = [ForgetExpert.read(path, substrate) for path in trained.experts.values()]
    retain = _rows(world, base, "retain")
    known = answer_losses(base, retain)
    attached = AttachedModel(base.model, substrate, experts)
    try:
        for name in ("red", "blue"):
            rows = _rows(world, base, name)
            assert mean_probability(answer_losses(base, rows)) < 0.08
            assert mean(greedy_rouge_l(base, rows)) < FORM_ALONE
        assert answer_losses(base, retain) == known
    finally:
        attached.detach()


@pytest.mark.parametrize(("num_rows", "weight"), [(4, 1.0), (200, 1.0), (250, 0.8), (4000, 0.5)])
def test_other_words_weigh_more_in_small_domains(num_rows: int, weight: float) -> None:
    assert ExpertSettings(others_weight=0.5).scaled_others_weight(num_rows) == weight
