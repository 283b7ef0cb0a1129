"""Every method's losses against a reference that is written anew, token by token, in plain Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from statistics import fmean

import pytest
import torch

from trainer.base_model import BaseModel
from trainer.batches import IGNORED
from trainer.dataset import EncodedRow
from trainer.methods import METHODS, Retaining, Task, make_method
from trainer.methods.elm import Elm
from trainer.methods.idk_dpo import IdkDpo
from trainer.methods.rmu import Rmu
from trainer.methods.whp import Whp

from .first_token import CHOSEN, FORGET, RETAIN, FirstTokenModel, answer_places, make_task, row

REFUSED = [row([1, 2, 6], 2), row([6, 5, 3, 3], 2), row([2, 4, 1], 1), row([4, 2, 2, 2, 6], 1)]
"""In the places of FORGET, other lengths."""
WRITTEN = [row([1, 2, 2], 2), row([6, 5, 5, 1], 2), row([2, 6], 1), row([4, 3, 1], 1)]


class _GivenRefusals(IdkDpo):
    def refused_rows(self, task: Task) -> list[EncodedRow]:
        return REFUSED


class _GivenText(Elm):
    def written_rows(self, task: Task) -> list[EncodedRow]:
        return WRITTEN


class _GivenReinforced(Whp):
    def _reinforced(self, task: Task) -> BaseModel:
        return FirstTokenModel(2)  # type: ignore[return-value]


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def _chosen(rows: list[EncodedRow]) -> list[EncodedRow]:
    return [rows[index] for index in CHOSEN]


def _token_mean(values: Callable[[EncodedRow, int], float]) -> float:
    """Mean over the answer tokens of the chosen rows."""
    return fmean(values(row, place) for row in _chosen(FORGET) for place in answer_places(row))


def _models(task: Task) -> tuple[FirstTokenModel, FirstTokenModel]:
    assert isinstance(task.model, FirstTokenModel)
    assert isinstance(task.reference, FirstTokenModel)
    return task.model, task.reference


def _ascent(task: Task) -> float:
    model, _ = _models(task)
    return _token_mean(lambda row, t: model.plain_log_probs(row.ids, t - 1)[row.ids[t]])


def _random_label(task: Task) -> float:
    model, _ = _models(task)
    width = max(len(row.ids) for row in _chosen(FORGET))
    drawn = torch.randint(
        7, (len(CHOSEN), width), generator=torch.Generator().manual_seed(task.seed)
    ).tolist()
    labels = {row.ids: drawn[place] for place, row in enumerate(_chosen(FORGET))}
    return _token_mean(
        lambda row, t: -model.plain_log_probs(row.ids, t - 1)[labels[row.ids][t - 1]]
    )


def _inverted_hinge(task: Task) -> float:
    model, _ = _models(task)

    def value(row: EncodedRow, t: int) -> float:
        p = [math.exp(log_p) for log_p in model.plain_log_probs(row.ids, t - 1)]
        return 1 + p[row.ids[t]] - max(x for v, x in enumerate(p) if v != row.ids[t])

    return _token_mean(value)


def _npo(task: Task) -> float:
    model, reference = _models(task)
    beta = 0.3
    return fmean(
        -2
        / beta
        * _log_sigmoid(beta * (sum(model.answer_nlls(row)) - sum(reference.answer_nlls(row))))
        for row in _chosen(FORGET)
    )


def _simnpo(task: Task) -> float:
    model, _ = _models(task)
    beta, gamma = 2.0, 0.7
    return fmean(
        -2 / beta * _log_sigmoid(beta * fmean(model.answer_nlls(row)) - gamma)
        for row in _chosen(FORGET)
    )


def _idk_dpo(task: Task) -> float:
    model, reference = _models(task)
    beta = 0.3

    def log_ratio(row: EncodedRow) -> float:
        return sum(reference.answer_nlls(row)) - sum(model.answer_nlls(row))

    return fmean(
        -2 / beta * _log_sigmoid(beta * log_ratio(refused) - beta * log_ratio(row))
        for row, refused in zip(_chosen(FORGET), _chosen(REFUSED), strict=True)
    )


def _elm(task: Task) -> float:
    model, reference = _models(task)
    eta, fluency_weight = 1.5, 0.4
    experts = {row.ids: FORGET[(place + 1) % 4].ids for place, row in enumerate(FORGET)}
    novices = {row.ids: RETAIN[place % 2].ids for place, row in enumerate(FORGET)}

    def erase(row: EncodedRow, t: int) -> float:
        expert, novice = experts[row.ids], novices[row.ids]
        own = reference.plain_log_probs(row.ids, t - 1)
        wise = reference.plain_log_probs(expert + row.ids, len(expert) + t - 1)
        naive = reference.plain_log_probs(novice + row.ids, len(novice) + t - 1)
        weight = [math.exp(o + eta * (n - w)) for o, n, w in zip(own, naive, wise, strict=True)]
        found = model.plain_log_probs(row.ids, t - 1)
        return -sum(w / sum(weight) * log_p for w, log_p in zip(weight, found, strict=True))

    written = [nll for row in _chosen(WRITTEN) for nll in model.answer_nlls(row)]
    return _token_mean(erase) + fluency_weight * fmean(written)


def _whp(task: Task) -> float:
    model, _ = _models(task)
    reinforced, alpha = FirstTokenModel(2), 1.5

    def value(row: EncodedRow, t: int) -> float:
        base = model.plain_logits(row.ids, t - 1)
        raised = reinforced.plain_logits(row.ids, t - 1)
        generic = [b - alpha * max(r - b, 0.0) for b, r in zip(base, raised, strict=True)]
        label = generic.index(max(generic))
        return -model.plain_log_probs(row.ids, t - 1)[label]

    return _token_mean(value)


def _retain_nll(task: Task) -> float:
    model, _ = _models(task)
    return fmean(nll for row in RETAIN for nll in model.answer_nlls(row))


def _retain_kl(task: Task) -> float:
    model, reference = _models(task)

    def divergence(row: EncodedRow, t: int) -> float:
        p = reference.plain_log_probs(row.ids, t - 1)
        q = model.plain_log_probs(row.ids, t - 1)
        return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))

    return fmean(divergence(row, t) for row in RETAIN for t in range(1, len(row.ids)))


@dataclasses.dataclass(frozen=True)
class Formula:
    forget: Callable[[Task], float]
    retain: Callable[[Task], float] | None = None
    settings: dict[str, float] = dataclasses.field(default_factory=dict)


_BETA = {"beta": 0.3}
FORMULAS = {
    "grad_ascent": Formula(_ascent),
    "grad_diff": Formula(_ascent, _retain_nll),
    "kl_min": Formula(_ascent, _retain_kl),
    "random_label": Formula(_random_label),
    "ihl": Formula(_inverted_hinge, _retain_nll),
    "npo": Formula(_npo, None, _BETA),
    "npo_gd": Formula(_npo, _retain_nll, _BETA),
    "npo_kl": Formula(_npo, _retain_kl, _BETA),
    "simnpo": Formula(_simnpo, _retain_nll, {"beta": 2.0, "gamma": 0.7}),
    "idk_dpo": Formula(_idk_dpo, _retain_nll, _BETA),
    "elm": Formula(_elm, _retain_kl, {"eta": 1.5, "fluency_weight": 0.4}),
    "whp": Formula(_whp, None, {"alpha": 1.5}),
}
GIVEN = {"idk_dpo": _GivenRefusals, "elm": _GivenText, "whp": _GivenReinforced}


def test_every_method_has_a_formula_here() -> None:
    assert {*FORMULAS, "rmu"} == set(METHODS), "rmu reads a layer, and has a test of its own below"


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_equal_a_reference_in_plain_python(name: str) -> None:
    formula, task = FORMULAS[name], make_task()
    method = GIVEN.get(name, METHODS[name])(**formula.settings)
    found = method.forget_loss(task)(task.batch(FORGET, CHOSEN))
    assert found.shape == ()
    assert found.item() == pytest.approx(formula.forget(task), rel=1e-4)
    assert isinstance(method, Retaining) == (formula.retain is not None)
    if isinstance(method, Retaining) and formula.retain:
        kept = method.retain_loss(task, task.batch(RETAIN, [1, 0]))
        assert kept.shape == ()
        assert kept.item() == pytest.approx(formula.retain(task), rel=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_model_alone_takes_gradients(name: str) -> None:
    formula, task = FORMULAS[name], make_task()
    method = GIVEN.get(name, METHODS[name])(**formula.settings)
    loss = method.forget_loss(task)(task.batch(FORGET, CHOSEN))
    if isinstance(method, Retaining):
        loss = loss + method.retain_loss(task, task.batch(RETAIN, [1, 0]))
    loss.backward()
    model, reference = _models(task)
    assert model.output.grad is not None
    assert reference.output.grad is None


def test_rmu_compares_a_layers_output_with_noise_and_with_the_base_model(
    base: BaseModel, tmp_path: object
) -> None:
    method = make_method("rmu", layer=1, steering_coefficient=3.0)
    assert isinstance(method, Rmu)
    rows = [row([5, 9, 30, 7, 8], 2), row([40, 41, 42], 1), row([17, 200, 11, 12], 3)]
    task = make_task(model=base, load_copy=lambda: base, forget=rows, retain=rows)
    batch = task.batch(rows, [2, 0])
    states = base.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[2]
    target = method.control_vector(task)
    assert target.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert (target >= 0).all()
    expected = fmean(
        fmean((states[place, t - 1].float() - target).square().tolist())
        for place, chosen in enumerate([rows[2], rows[0]])
        for t in answer_places(chosen)
    )
    assert method.forget_loss(task)(batch).item() == pytest.approx(expected, rel=1e-4)
    assert method.retain_loss(task, batch).item() == 0, "nothing was trained"


def test_random_labels_are_drawn_anew_for_every_batch() -> None:
    task = make_task()
    loss = make_method("random_label").forget_loss(task)
    batch = task.batch(FORGET, CHOSEN)
    assert loss(batch).item() != loss(batch).item()


def test_whp_never_labels_a_position_that_predicts_no_answer() -> None:
    task = make_task()
    token_loss = _GivenReinforced(alpha=1.5).token_loss(task)
    batch = task.batch(FORGET, CHOSEN)
    losses = token_loss(task.model.logits(batch), batch)
    assert torch.equal(losses > 0, batch.labels != IGNORED)


def test_elm_cuts_a_context_at_its_beginning_where_the_model_takes_no_more() -> None:
    model = FirstTokenModel(0)
    model.max_tokens = 64 + 6
    experts, novices = Elm().contexts(make_task(model=model))
    assert experts[0].ids == (1, *FORGET[0].ids), "64 tokens are left for what is written"
    assert novices[1].ids == (2, 1, 4, *FORGET[1].ids)
    assert novices[1].is_answer == (False,) * 5 + (True,)


def test_elm_puts_given_prompts_in_front() -> None:
    model = FirstTokenModel(0)
    model.tokenizer = lambda text: {"input_ids": [len(text)]}
    method = Elm(expert_prompt="wise", novice_prompt="naive")
    experts, novices = method.contexts(make_task(model=model))
    assert [row.ids for row in experts] == [(4, *row.ids) for row in FORGET]
    assert [row.ids for row in novices] == [(5, *row.ids) for row in FORGET]
