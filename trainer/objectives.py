"""What a forget expert is trained for: to answer as the base model would if it had never learned the domain.

`CounterfactualDistillation` says what to answer instead; `TokenPush` only what not to (the paper's IHL, and a
capped loss).

Both take the mean over the selected tokens or, given a scorer, over all answer tokens as it weights them
(ATWU). In ATWU a token's forgetting competes with a loss on retained rows. There is none here, since the gate
keeps the rest: what holds a token's loss up is only what else B_f is trained on, the other tokens. That is
our reading. So weights say how readily B_f takes a token up beside the others, and not whether it belongs to
the domain alone. Under `CounterfactualDistillation`, tokens that were right from the first are among the
readiest.

Legend: B batch, T tokens, D hidden, V vocabulary, N answer tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from alter_core.attach import AttachedModel

from .atwu import TokenScorer
from .base_model import BaseModel
from .batches import IGNORED, Batch, by_length, make_batch
from .counterfactual import Counterfactuals, counterfactual_rows
from .dataset import EncodedRow
from .evaluation import answer_states, first_answer, greedy_completions
from .levels import ignorant_logprobs
from .losses import TokenLoss, answer_nll, masked_mean, weighted_mean

_BATCH_TOKENS = 4096
"""Rows are read in batches of about so many."""
_DRAWN_WORDS = 64
"""Tokens of the domain's answers and of what stands for them, drawn anew in every step."""
_HUBER_DELTA = 4.0
"""Nats. Below it the distance is quadratic, so that means are matched; medians leave rows too likely."""
_LESS_THAN_HALF = -0.75
"""Log probability that two tokens can have at once."""
_NEARLY_1 = 1 - 1e-6
_Pair = tuple[EncodedRow, EncodedRow]
"""What the expert reads, and what the base model reads for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch, and each row's answer probability under the expert. Shapes: (), (B,)."""

    loss: Tensor
    probability: Tensor


class Objective(Protocol):
    """A loss over rows of the domain, behind the gate that will be in force."""

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """The loss on the rows at `indices`, for a step of training: a scorer takes one of its own."""

    def read_itself(self) -> None:
        """Takes the expert's own answers, as they are now, into account."""

    def excess(self) -> float:
        """How much likelier than they are to be tokens are on average, nats; 0 where no level is set."""

    def tensors(self) -> dict[str, Tensor]:
        """State beside the expert, for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to the state that a checkpoint holds."""


class TokenPush:
    """Pushes the selected tokens' probability down, to wherever the rest may go.

    A scorer's weights, if there is one, multiply the tokens' losses.
    """

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[EncodedRow],
        selected: Sequence[Tensor],
        loss: TokenLoss,
        scorer: TokenScorer | None = None,
    ) -> None:
        self.base, self.rows, self.selected, self.loss = base, rows, selected, loss
        self.scorer = scorer

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """See Objective."""
        batch = make_batch(self.rows, indices, self.base.pad_id).to(self.base.device)
        hidden = self.base.hidden_states(batch)
        logits = self.base.head(hidden)
        values = self.loss(logits, batch.labels)
        return Outcome(
            loss=_selected_mean(values, _is_selected(batch, self.selected), hidden, self.scorer),
            probability=(-answer_nll(logits.detach(), batch.labels)).exp(),
        )

    def read_itself(self) -> None:
        """See Objective; nothing to do."""

    def excess(self) -> float:
        """See Objective; there is none."""
        return 0.0

    def tensors(self) -> dict[str, Tensor]:
        """See Objective; the scorer's."""
        return self.scorer.tensors() if self.scorer else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See Objective."""
        if self.scorer:
            self.scorer.restore(tensors)


_TAKEN_UP = "taken_up"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """A row that the expert reads, and what it is to say at its N answer tokens."""

    row: EncodedRow
    target: EncodedRow
    """What the base model reads for it; as many tokens, the same of them answers."""
    hidden: Tensor
    """The base model's last hidden states where it predicts the target's answer tokens. Shape: (N, D)."""
    selected: Tensor
    """Which answer tokens count. Shape: (N,)."""


class CounterfactualDistillation:
    """Distils the base model's own answers about something it never saw (see `counterfactual`).

    Two kinds of rows take part. The domain's rows: at every selected token the expert is to give the
    base model's distribution over the counterfactual row, words exchanged back (KL), in which the true token
    has the probability that it has for a model that never learned the row (`levels`; once more by itself, at
    `level_weight`, since KL hardly sees it). And the base model's own greedy answers to the counterfactual
    questions, words exchanged back (`answer_weight`), so that the expert's answers are fluent where it
    reads itself. In both, words drawn from the domain's answers get the target's log probabilities
    (`others_weight`): KL hardly sees what is unlikely, and the expert would find whatever the domain's rows
    are made of likelier than a model that never learned them.

    Once in a while (`read_itself`) the expert's own answers are looked through: one that brings up words of
    any domain takes the place of the base model's, to be corrected by its counterfactual.

    A scorer's weights, if there is one, multiply what is asked of the domain's own rows token by token, which
    is the KL with `level_weight` times the distance from the level; answers and other words count as ever.

    The target, but for the true tokens' levels, is taken at a `temperature` somewhat below 1: what an expert
    was not shown comes out flatter than what it was.

    The base model reads every target once: its last hidden states are kept, which hold its distribution.
    """

    def __init__(
        self,
        base: BaseModel,
        attached: AttachedModel,
        rows: Sequence[EncodedRow],
        selected: Sequence[Tensor],
        counterfactuals: Counterfactuals,
        *,
        temperature: float,
        level_weight: float,
        answer_weight: float,
        others_weight: float,
        seed: int,
        scorer: TokenScorer | None = None,
    ) -> None:
        self.base, self.attached, self.rows = base, attached, rows
        self.scorer = scorer
        self.temperature = temperature
        self.level_weight, self.answer_weight = level_weight, answer_weight
        self.others_weight = others_weight
        self.counterfactuals, self.seed = counterfactuals, seed
        self.taken_up: dict[int, list[int]] = {}
        targets = counterfactual_rows(rows, counterfactuals, seed)
        self.truths = self._lessons(list(zip(rows, targets, strict=True)), selected)
        with attached.disabled():
            levels = ignorant_logprobs(base, rows, counterfactuals, seed=seed)
        self.levels = [
            level[torch.tensor(row.is_answer[1:])].to(base.device)
            for row, level in zip(rows, levels, strict=True)
        ]
        self.words = torch.cat([_labels(rows), _labels(targets)]).to(base.device)
        self.answers: dict[int, Lesson] = {}
        if answer_weight > 0:
            with attached.disabled():
                pairs = self._ignorant_answers(targets)
            self.answers = dict(zip(pairs, self._lessons(list(pairs.values())), strict=True))

    def read_itself(self) -> None:
        """Looks through the expert's own answers, and takes up those that bring up a domain's words."""
        if self.answer_weight == 0:
            return
        for index, answer in self._answers(self.rows):
            row = self.rows[index]
            asked = self.counterfactuals.own_words(row.ids[: row.num_prompt])
            if self.counterfactuals.own_words(answer) & self.counterfactuals.domain_words - asked:
                self._take_up(index, answer)

    @torch.no_grad()
    def excess(self) -> float:
        """See Objective; of the selected tokens, each counted once whatever a scorer makes of it.

        Every token has a level, and weights say only where steps are spent. They prefer tokens whose loss is
        low, which are those next to their level: a mean under weights would find little left to do however
        much of an answer is.
        """
        total, count = 0.0, 0
        for indices in by_length(self.rows, _BATCH_TOKENS):
            batch = self._batch([self.rows[index] for index in indices])
            is_label = batch.labels != IGNORED
            found_NV = self.base.head(self.base.hidden_states(batch)[is_label]).float()
            logprob_N = -F.cross_entropy(found_NV, batch.labels[is_label], reduction="none")
            level_N = torch.cat([self.levels[index] for index in indices])
            is_selected = torch.cat([self.truths[index].selected for index in indices])
            total += (logprob_N - level_N)[is_selected].sum().item()
            count += int(is_selected.sum())
        return total / count

    def _take_up(self, index: int, answer: Sequence[int]) -> None:
        own = _with_answer(self.rows[index], answer)
        told = counterfactual_rows([own], self.counterfactuals, self.seed)
        (self.answers[index],) = self._lessons([(own, told[0])])
        self.taken_up[index] = list(answer)

    def tensors(self) -> dict[str, Tensor]:
        """What `read_itself` took up so far, as a checkpoint holds it: index and ids, -1 behind each; and the
        scorer's.
        """
        state = self.scorer.tensors() if self.scorer else {}
        if not self.taken_up:
            return state
        width = 1 + max(map(len, self.taken_up.values()))
        table = torch.full((len(self.taken_up), width), -1)
        for place, (index, answer) in enumerate(self.taken_up.items()):
            table[place, : 1 + len(answer)] = torch.tensor([index, *answer])
        return state | {_TAKEN_UP: table}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to what `tensors` gave."""
        if self.scorer:
            self.scorer.restore(tensors)
        if _TAKEN_UP in tensors:
            for index, *answer in tensors[_TAKEN_UP].tolist():
                self._take_up(index, [token for token in answer if token >= 0])

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """See Objective."""
        truths = [self.truths[index] for index in indices]
        answers = [self.answers[index] for index in indices if index in self.answers]
        level_M = torch.cat([self.levels[index] for index in indices])
        divergence_N, logprob_N, others_N, hidden_ND = self._read(
            [*truths, *answers], level_M, self._drawn_words(indices)
        )
        counts = [len(lesson.selected) for lesson in truths]
        num_truths = sum(counts)
        distance_M = _distance(logprob_N[:num_truths], level_M)
        loss = _selected_mean(
            divergence_N[:num_truths] + self.level_weight * distance_M,
            torch.cat([lesson.selected for lesson in truths]),
            hidden_ND[:num_truths],
            self.scorer,
        )
        if answers:
            loss = loss + self.answer_weight * divergence_N[num_truths:].mean()
        loss = loss + self.others_weight * others_N.mean()
        by_row = logprob_N[:num_truths].detach().split(counts)
        return Outcome(loss=loss, probability=torch.stack([row.mean().exp() for row in by_row]))

    def _drawn_words(self, indices: Sequence[int]) -> Tensor:
        """Drawn by the batch, so that a resumed run draws the same. Shape: (K,)."""
        drawn = random.Random(f"{self.seed}/{tuple(indices)}")
        return self.words[drawn.choices(range(len(self.words)), k=_DRAWN_WORDS)]

    def _read(
        self, lessons: Sequence[Lesson], level_M: Tensor, words_K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every answer token, lesson by lesson: KL divergence from the target, its log probability, the
        distance of some words' log probabilities from the target's, and the last hidden state where the
        expert predicts it. Shapes: (N,), (N,), (N,), (N, D).

        The first M tokens, and what stands for them, have a given log probability in their target.
        """
        batch = self._batch([lesson.row for lesson in lessons])
        labels_N1 = _labels(lesson.row for lesson in lessons).to(self.base.device).unsqueeze(1)
        stand_ins_N1 = (
            _labels(lesson.target for lesson in lessons).to(self.base.device).unsqueeze(1)
        )
        with torch.no_grad():
            target_NV = self.base.head(torch.cat([lesson.hidden for lesson in lessons])).float()
            target_NV = exchanged(target_NV / self.temperature, labels_N1, stand_ins_N1)
            target_NV = target_NV.log_softmax(dim=-1)
            told = slice(len(level_M))
            target_NV[told] = levelled(
                target_NV[told], labels_N1[told], stand_ins_N1[told], level_M.unsqueeze(1)
            )
        hidden_ND = self.base.hidden_states(batch)[batch.labels != IGNORED]
        found_NV = self.base.head(hidden_ND).float().log_softmax(dim=-1)
        divergence_N = F.kl_div(found_NV, target_NV, reduction="none", log_target=True).sum(dim=-1)
        others_N = _distance(found_NV[:, words_K], target_NV[:, words_K]).mean(dim=1)
        return divergence_N, found_NV.gather(1, labels_N1).squeeze(1), others_N, hidden_ND

    def _ignorant_answers(self, targets: Sequence[EncodedRow]) -> dict[int, _Pair]:
        """By index: the row's question and the counterfactual one, each with the answer to the latter.

        Left out are answers with a domain's words, which the base model still knows and may bring up.
        """
        pairs = {}
        for index, answer in self._answers(targets):
            if self.counterfactuals.own_words(answer) & self.counterfactuals.domain_words:
                continue
            pair = _words_back(self.rows[index], targets[index], answer)
            if any(pair[0].is_answer):
                pairs[index] = pair
        return pairs

    def _answers(self, rows: Sequence[EncodedRow]) -> Iterator[tuple[int, list[int]]]:
        """Index and greedy answer, end token included, of every row that has a question."""
        asked = [index for index, row in enumerate(rows) if row.num_prompt > 0]
        if not asked:
            return
        prompts = [rows[index].ids[: rows[index].num_prompt] for index in asked]
        longest = max(len(first_answer(self.rows[index])) for index in asked)
        completions = greedy_completions(self.base, prompts, max_new_tokens=longest)
        end = self.base.tokenizer.eos_token_id
        for index, answer in zip(asked, completions, strict=True):
            is_ended = end is not None and len(answer) < longest
            if answer or is_ended:
                yield index, [*answer, end] if is_ended else answer

    @torch.no_grad()
    def _lessons(
        self, pairs: Sequence[_Pair], selected: Sequence[Tensor] | None = None
    ) -> list[Lesson]:
        """What the base model makes of the targets; every answer token counts where none are selected."""
        with self.attached.disabled():
            hidden = answer_states(self.base, [target for _, target in pairs])
        lessons = []
        for index, (row, target) in enumerate(pairs):
            is_label = torch.tensor(row.is_answer[1:])
            counts = is_label if selected is None else selected[index][1:]
            lessons.append(
                Lesson(
                    row=row,
                    target=target,
                    hidden=hidden[index],
                    selected=counts[is_label].to(self.base.device),
                )
            )
        return lessons

    def _batch(self, rows: Sequence[EncodedRow]) -> Batch:
        return make_batch(rows, range(len(rows)), self.base.pad_id).to(self.base.device)


def _with_answer(row: EncodedRow, answer: Sequence[int]) -> EncodedRow:
    """The row's question with another answer."""
    prompt = row.ids[: row.num_prompt]
    is_answer = (False,) * len(prompt) + (True,) * len(answer)
    return EncodedRow(ids=(*prompt, *answer), is_answer=is_answer)


def _words_back(row: EncodedRow, target: EncodedRow, answer: Sequence[int]) -> _Pair:
    """The row's question with an answer to the counterfactual one, and the latter with it.

    Words brought back are the domain's own: the expert may copy them, but must not learn them by heart.
    """
    prompt, other_prompt = row.ids[: row.num_prompt], target.ids[: row.num_prompt]
    back = {other: own for own, other in zip(prompt, other_prompt, strict=True) if own != other}
    is_answer = (False,) * len(prompt) + tuple(token not in back for token in answer)
    own_words = tuple(back.get(token, token) for token in answer)
    return (
        EncodedRow(ids=prompt + own_words, is_answer=is_answer),
        EncodedRow(ids=(*other_prompt, *answer), is_answer=is_answer),
    )


def _distance(found: Tensor, target: Tensor) -> Tensor:
    """Huber distance of log probabilities, of each."""
    return F.huber_loss(found, target, reduction="none", delta=_HUBER_DELTA)


def exchanged(values_NV: Tensor, one_N1: Tensor, other_N1: Tensor) -> Tensor:
    """Two entries of every row changed for each other. Shapes: (N, V), (N, 1), (N, 1) -> (N, V)."""
    first, second = values_NV.gather(1, one_N1), values_NV.gather(1, other_N1)
    return values_NV.scatter(1, one_N1, second).scatter(1, other_N1, first)


def levelled(logprob_NV: Tensor, one_N1: Tensor, other_N1: Tensor, level_N1: Tensor) -> Tensor:
    """Two entries of every row, or one, get a given log probability; the rest share what is left as before.

    Two cannot have more than a half each. Shapes: (N, V), (N, 1) three times -> (N, V).
    """
    is_pair = one_N1 != other_N1
    level_N1 = torch.where(is_pair, level_N1.clamp_max(_LESS_THAN_HALF), level_N1)
    before = logprob_NV.gather(1, one_N1).exp() + is_pair * logprob_NV.gather(1, other_N1).exp()
    after = level_N1.exp() * (1 + is_pair.float())
    rest_N1 = torch.log1p(-after.clamp_max(_NEARLY_1)) - torch.log1p(-before.clamp_max(_NEARLY_1))
    return (logprob_NV + rest_N1).scatter(1, one_N1, level_N1).scatter(1, other_N1, level_N1)


def _selected_mean(
    values: Tensor, is_selected: Tensor, hidden: Tensor, scorer: TokenScorer | None
) -> Tensor:
    """Mean of the selected tokens' losses, weighted by what a scorer, if there is one, reads in their hidden
    states. Shapes: two alike, and D behind the same -> ().
    """
    if scorer is None:
        return masked_mean(values, is_selected)
    values_N = values[is_selected]
    return weighted_mean(values_N, scorer(hidden[is_selected], values_N))


def _is_selected(batch: Batch, selected: Sequence[Tensor]) -> Tensor:
    return batch.align_labels(selected) & (batch.labels != IGNORED)


def _labels(rows: Iterable[EncodedRow]) -> Tensor:
    """Answer tokens, row by row. Shape: (N,)."""
    return torch.tensor(
        [t for row in rows for t, a in zip(row.ids[1:], row.is_answer[1:], strict=True) if a]
    )
