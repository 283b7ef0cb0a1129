"""Training of one domain's evidence head: one-vs-retain, on input embeddings alone.

The router logit is a maximum over n-gram scores, which cannot be learned through the maximum from
scratch. Three stages do it:

1. pointwise: windows that only the domain holds (`windows.DomainWindows`, weighted by how telling they are)
   against every window of the negatives;
2. bags: the soft maximum over what is in view at the first answer token, and at later ones, must be
   positive; the soft maximum is sharpened as it goes, and half of each bag is hidden, so that a prompt does
   not hang on one window; negatives stay pointwise, half of them the worst false alarms;
3. calibration on negatives that took no part, then a last stretch with them.

Legend: W windows, G n-gram, U distinct tokens, D embedding size, H units, N bags, K windows of a bag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from alter_core.config import AlterConfig
from alter_core.errors import TrainingError
from alter_core.evidence import NO_EVIDENCE, EvidenceHead

from .dataset import EncodedRow
from .dates import DatePhrases
from .windows import DomainWindows, NegativeWindows, window_keys, windows_of

Progress = Callable[[float], None]
"""Called after every step with its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceSettings:
    """How evidence heads are trained."""

    pointwise_steps: int = 150
    """Steps of stage 1, for a domain of at most `full_tokens`; of larger ones in proportion."""
    bag_steps: int = 300
    """The same of stage 2."""
    final_steps: int = 80
    """The same of stage 3, after calibration."""
    full_tokens: int = 12_000
    """A domain of more tokens is trained on for more steps."""
    learning_rate: float = 2e-3
    """Adam's learning rate."""
    margin: float = 3.0
    """Distance from 0 that every score is pushed to, in logits."""
    bag_dropout: float = 0.5
    """Share of a bag's windows hidden at each step, 0 to 1."""
    hard_negatives: bool = True
    """Whether negatives are drawn from the worst false alarms and from near misses too."""
    negative_weight: float = 4.0
    """Weight of the negatives' loss."""
    rewritten_dates: bool = True
    """Whether a date in a question is evidence however it is written."""
    holdout: float = 0.1
    """Share of the negative rows kept aside for calibration, 0 to 1."""
    max_negative_tokens: int = 700_000
    """Negative text beyond this is left out, general text first."""

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return self.pointwise_steps + self.bag_steps + self.final_steps

    def scaled(self, rows: Sequence[EncodedRow]) -> EvidenceSettings:
        """The settings with as many steps as a domain of these rows takes."""
        factor = max(1.0, sum(len(row.ids) for row in rows) / self.full_tokens)
        return dataclasses.replace(
            self,
            pointwise_steps=round(factor * self.pointwise_steps),
            bag_steps=round(factor * self.bag_steps),
            final_steps=round(factor * self.final_steps),
        )


_POINTWISE_BATCH = 256
_BAG_BATCH = 64
_NEGATIVE_BATCH = 1024
_RANDOM_BATCH = 128
_NEAR_BATCH = 256
_HARD_POOL = 4096
_MINING_BEFORE, _MINING_AFTER = 8, 3
"""How often the worst false alarms are looked up, before and after calibration."""
_BAG_STRIDE = 32
_FEW_WINDOWS = 3
_FEW_MARGIN = 4.0
"""Added where a bag has few windows: a maximum over many lies higher, and calibration lowers all alike."""
_CALIBRATION_ROOM = 2.5
_SHIFT_SHARE = 0.6
_SCORE_CHUNK = 65_536


class WindowScorer:
    """Scores windows of token ids, projecting each distinct token once instead of each window."""

    def __init__(self, head: EvidenceHead, embeddings: Tensor) -> None:
        """`embeddings` (V, D) normalised; row 0 of the shifted ids is the zero vector."""
        self.head = head
        self.embeddings = embeddings

    def __call__(self, windows: Tensor) -> Tensor:
        """Shapes: shifted ids (W, G) -> (W,)."""
        ngram, units = self.head.ngram, self.head.fc1.out_features
        tokens, place = torch.unique(windows, return_inverse=True)
        table_UD = self.embeddings[(tokens - 1).clamp_min(0)] * (tokens > 0).unsqueeze(1)
        weight_DGH = self.head.fc1.weight.view(units, ngram, -1).permute(2, 1, 0)
        projected_UGH = (table_UD @ weight_DGH.flatten(1)).view(len(tokens), ngram, units)
        hidden_WH: Tensor = self.head.fc1.bias
        for position in range(ngram):
            hidden_WH = hidden_WH + F.embedding(place[:, position], projected_UGH[:, position])
        scores: Tensor = self.head.fc2(torch.relu(hidden_WH)).squeeze(-1)
        return scores

    @torch.no_grad()
    def all(self, windows: Tensor) -> Tensor:
        """The same for any number of windows, without gradients."""
        return torch.cat([self(chunk) for chunk in windows.split(_SCORE_CHUNK)])


def train_evidence(
    embeddings: Tensor,
    rows: Sequence[EncodedRow],
    negatives: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: AlterConfig,
    settings: EvidenceSettings,
    *,
    seed: int,
    progress: Progress = lambda _: None,
) -> tuple[EvidenceHead, dict[str, float]]:
    """Trains one domain's head; returns it with its calibration figures.

    `embeddings` (V, D) are normalised by the substrate; `negatives` are token ids, most important first.
    Raises: TrainingError if the domain holds nothing that the negatives do not hold too.
    """
    settings = settings.scaled(rows)
    phrases: Sequence[Sequence[int]] = ()
    if settings.rewritten_dates:
        dates = DatePhrases.of(rows, negatives, tokenizer, seed=seed)
        phrases, negatives = dates.own, [*dates.near, *negatives]
    training = _EvidenceTraining(embeddings, rows, phrases, negatives, config, settings, seed)
    for step in range(settings.num_steps):
        progress(training.step(step))
    training.finish()
    head = training.head.requires_grad_(False)
    return head, training.calibration


class _EvidenceTraining:
    def __init__(
        self,
        embeddings: Tensor,
        rows: Sequence[EncodedRow],
        phrases: Sequence[Sequence[int]],
        negatives: Sequence[Sequence[int]],
        config: AlterConfig,
        settings: EvidenceSettings,
        seed: int,
    ) -> None:
        ngram = config.evidence_ngram
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        texts = _within(negatives, settings.max_negative_tokens)
        self.negatives = NegativeWindows.of(texts, ngram)
        shown = [EncodedRow(ids=tuple(ids), is_answer=(True,) * len(ids)) for ids in phrases]
        self.domain = DomainWindows.of([*rows, *shown], self.negatives, ngram)
        self.num_rows = len(rows)
        if not (self.domain.weight > 0).any():
            raise TrainingError(
                "No text of the forget domain sets it apart from what is to be retained",
                expected="words or names that only the domain holds",
                got="none",
                fix="Check that the retain and general files do not hold the same people or topics.",
            )
        self.windows = torch.from_numpy(self.domain.windows)
        self.suffix_length = torch.from_numpy(self.domain.suffix_length)
        self.traces = torch.from_numpy(np.flatnonzero(self.domain.weight > 0))
        self.trace_weight = torch.from_numpy(self.domain.weight)[self.traces]
        self.telling_keys = {
            count: window_keys(self.domain.windows[self.domain.suffix_length == count][:, -count:])
            for count in range(1, ngram + 1)
        }
        self.bags = _bags(self.domain, config.evidence_window)
        self.held_out, kept = self._split(texts, ngram)
        self.all_negatives = torch.from_numpy(self.negatives.windows)
        self.pool = kept
        self.hard = kept[:1]
        self.vocabulary = len(embeddings)
        self.calibration: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = EvidenceHead(
                embeddings.shape[1], ngram=ngram, num_units=config.evidence_units
            )
        self.scorer = WindowScorer(self.head, embeddings.cpu())
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.learning_rate)

    def step(self, step: int) -> float:
        """One optimiser step; stages follow from its number."""
        settings = self.settings
        num_before = settings.pointwise_steps + settings.bag_steps
        if step == num_before:
            self._calibrate()
            self.pool = self.all_negatives
        rounds, start, length = _MINING_BEFORE, 0, num_before
        if step >= num_before:
            rounds, start, length = _MINING_AFTER, num_before, settings.final_steps
        if (step - start) % max(1, length // rounds) == 0:
            scores = self.scorer.all(self.pool)
            self.hard = self.pool[scores.topk(min(_HARD_POOL, len(scores))).indices]
        if step < settings.pointwise_steps:
            positive = self._pointwise_loss()
        else:
            sharpness = min(1.0, (step - settings.pointwise_steps) / max(settings.bag_steps, 1))
            positive = self._bag_loss(sharpness)
        negative = F.softplus(self.scorer(self._negative_batch()) + settings.margin).mean()
        loss = positive + settings.negative_weight * negative
        if not torch.isfinite(loss):
            raise TrainingError(
                "The evidence loss is not finite", expected="a number", got=str(loss.item())
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _pointwise_loss(self) -> Tensor:
        chosen = torch.multinomial(
            self.trace_weight, _POINTWISE_BATCH, replacement=True, generator=self.generator
        )
        windows = self._vary(self.traces[chosen], share=0.5)
        return F.softplus(self.settings.margin - self.scorer(windows)).mean()

    def _bag_loss(self, sharpness: float) -> Tensor:
        """Soft maximum over each bag: tau log sum exp(s / tau), tau from 1 to 0.2, at first as a mean."""
        chosen = torch.randint(len(self.bags), (_BAG_BATCH,), generator=self.generator)
        bags_NK = self.bags[chosen]
        is_there = bags_NK >= 0
        keep = is_there & (
            torch.rand(bags_NK.shape, generator=self.generator) >= self.settings.bag_dropout
        )
        keep = torch.where(keep.any(dim=1, keepdim=True), keep, is_there)
        scores = self.scorer(self._vary(bags_NK[keep], share=0.3))
        scores_NK = torch.full(bags_NK.shape, NO_EVIDENCE).masked_scatter(keep, scores)
        tau = 1.0 - 0.8 * sharpness
        mean_share = max(0.0, 1.0 - 2 * sharpness)
        pooled_N = tau * torch.logsumexp(scores_NK / tau, dim=1)
        pooled_N = pooled_N - tau * mean_share * keep.sum(dim=1).log()
        margin_N = self.settings.margin + _FEW_MARGIN * (is_there.sum(dim=1) <= _FEW_WINDOWS)
        return F.softplus(margin_N - pooled_N).mean()

    def _vary(self, indices: Tensor, share: float) -> Tensor:
        """Windows of the domain, in which tokens before the specific suffix are replaced at random."""
        windows = self.windows[indices]
        shape = windows.shape
        drawn = torch.randint(len(self.all_negatives), shape, generator=self.generator)
        others = self.all_negatives[:, -1][drawn]
        is_free = torch.arange(shape[1]) < (shape[1] - self.suffix_length[indices]).unsqueeze(1)
        is_chosen = torch.rand(len(windows), 1, generator=self.generator) < share
        return torch.where(is_free & is_chosen, others, windows)

    def _negative_batch(self) -> Tensor:
        def some(pool: Tensor) -> Tensor:
            return pool[torch.randint(len(pool), (_NEGATIVE_BATCH // 2,), generator=self.generator)]

        # Tokens that no negative text holds must not fire either.
        shape = (_RANDOM_BATCH, self.windows.shape[1])
        noise = torch.randint(1, self.vocabulary + 1, shape, generator=self.generator)
        if not self.settings.hard_negatives:
            return torch.cat([some(self.pool), some(self.pool), noise])
        return torch.cat([some(self.pool), some(self.hard), noise, self._near_misses()])

    def _near_misses(self) -> Tensor:
        """Traces with one or more of their telling tokens replaced: half a name is no evidence."""
        draw = torch.multinomial(
            self.trace_weight, 2 * _NEAR_BATCH, replacement=True, generator=self.generator
        )
        traces, others = self.traces[draw].chunk(2)
        windows, ngram = self.windows[traces], self.windows.shape[1]
        length = self.suffix_length[traces].unsqueeze(1)
        is_telling = torch.arange(ngram) >= ngram - length
        drawn = torch.randint(len(self.all_negatives), windows.shape, generator=self.generator)
        tokens = torch.where(
            torch.rand(len(windows), 1, generator=self.generator) < 0.5,
            self.windows[others],
            self.all_negatives[:, -1][drawn],
        )
        is_replaced = is_telling & (torch.rand(windows.shape, generator=self.generator) < 0.4)
        windows = torch.where(is_replaced, tokens, windows)
        is_known = np.zeros(len(windows), dtype=np.bool_)
        for count, keys in self.telling_keys.items():
            is_known |= np.isin(window_keys(windows[:, -count:].numpy()), keys)
        return windows[torch.from_numpy(~is_known)]

    def _split(self, texts: Sequence[Sequence[int]], ngram: int) -> tuple[list[Tensor], Tensor]:
        """(windows of each text kept aside, distinct windows of the others)."""
        is_held = torch.rand(len(texts), generator=self.generator) < self.settings.holdout
        held = [
            torch.from_numpy(windows_of(t, ngram))
            for t, out in zip(texts, is_held, strict=True)
            if out
        ]
        rest = [t for t, out in zip(texts, is_held, strict=True) if not out]
        kept = NegativeWindows.of(rest or texts, ngram).windows
        return held, torch.from_numpy(kept)

    def _calibrate(self) -> None:
        """Moves the bias so that the highest score of any held-out text stays below 0."""
        alarms = [self.scorer.all(windows).max().item() for windows in self.held_out]
        shift = self._shift(max(alarms, default=0.0))
        self.calibration = {
            "shift": round(shift, 3),
            "held_out_texts": len(alarms),
            "held_out_false_alarms": sum(alarm > shift for alarm in alarms),
        }

    def finish(self) -> None:
        """The same once more, on all negatives."""
        shift = self._shift(self.scorer.all(self.all_negatives).max().item())
        self.calibration["final_shift"] = round(shift, 3)

    def _shift(self, highest: float) -> float:
        """By 60 % of what the weakest prompts score at most: an odd negative may not cost the domain."""
        scores = self.scorer.all(self.windows)
        domain = self.domain
        places = list(zip(domain.starts, domain.prompt_lengths, strict=True))[: self.num_rows]
        prompts = [scores[start : start + length].max().item() for start, length in places]
        weakest = float(np.quantile(prompts, 0.05))
        shift = max(0.0, min(highest + _CALIBRATION_ROOM, _SHIFT_SHARE * weakest))
        with torch.no_grad():
            self.head.fc2.bias.sub_(shift)
        return shift


def _within(texts: Sequence[Sequence[int]], max_tokens: int) -> list[Sequence[int]]:
    kept: list[Sequence[int]] = []
    num_tokens = 0
    for text in texts:
        if num_tokens + len(text) > max_tokens and kept:
            break
        kept.append(text)
        num_tokens += len(text)
    return kept


def _bags(domain: DomainWindows, window: int) -> Tensor:
    """Indices of the windows in view where evidence is needed, -1 where a bag is shorter. Shapes: (N, K).

    In view means the last `window` tokens at the first answer token, at every 32nd after it, and at the end.
    Traces alone, if there are any, else other windows that are as rare; a bag without either is left out:
    its tokens are better missed than found by a phrase that anyone may use.
    """
    bags = []
    for start, length, prompt in zip(
        domain.starts, domain.lengths, domain.prompt_lengths, strict=True
    ):
        ends = {prompt - 1, *range(prompt - 1 + _BAG_STRIDE, length, _BAG_STRIDE), length - 1}
        for end in sorted(ends):
            view = np.arange(start + max(0, end - window + 1), start + end + 1)
            traces = view[domain.weight[view] > 0]
            bag = traces if len(traces) else view[domain.is_rare[view]]
            if len(bag):
                bags.append(torch.from_numpy(bag))
    return nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=-1)


def train_scalar_weight(domain: Tensor, negatives: Tensor) -> float:
    """Eq. 7 taken literally: one weight on S_q that is to tell a domain's tokens from others, by BCE.

    It cannot: S_q >= 0 makes the sign of the weight the answer for every token. Kept for ablation.
    Shapes: domain (T,), negatives (T',), both S_q.
    """
    weight = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(200):
        loss = F.softplus(-weight * domain).mean() + F.softplus(weight * negatives).mean()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
    return weight.item()
