"""Training of one domain's evidence head: one-vs-retain, on input embeddings alone.

The router logit is a maximum over n-gram scores, which cannot be learned through the maximum from
scratch. Two stages do it:

1. pointwise: windows that only the domain holds (`windows.DomainWindows`, weighted by how telling they are)
   against every window of the negatives;
2. bags: the soft maximum over what is in view at the first answer token, and at later ones, must be
   positive; the soft maximum is sharpened as it goes, and half of each bag is hidden, so that a prompt does
   not hang on one window; negatives stay pointwise, half of them the worst false alarms.

Which windows of text never seen set off a head is chance, and heads trained apart do not share it: a domain's
head is the mean of a few. Last, its bias is lowered by what the domain's weakest prompts leave room for.

Legend: W windows, G n-gram, U distinct tokens, D embedding size, H units, N bags, K windows of a bag.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from alter_core.config import AlterConfig
from alter_core.errors import ConfigError, TrainingError
from alter_core.evidence import NO_EVIDENCE, EvidenceHead

from .dataset import EncodedRow
from .dates import DatePhrases
from .windows import DomainWindows, NegativeWindows, window_keys

Progress = Callable[[float], None]
"""Called after every step with its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceSettings:
    """How evidence heads are trained."""

    pointwise_steps: int = 150
    """Steps of stage 1, for a domain of at most `full_tokens`; of larger ones in proportion."""
    bag_steps: int = 600
    """The same of stage 2."""
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
    members: int = 3
    """Heads trained apart, whose mean is the head: what one takes for evidence by chance, others do not."""
    max_negative_tokens: int = 700_000
    """Negative text beyond this is left out, general text first."""

    def __post_init__(self) -> None:
        for name in ("full_tokens", "learning_rate", "members", "max_negative_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} is out of range", expected="> 0", got=str(getattr(self, name))
                )
        if not 0 <= self.bag_dropout < 1:
            raise ConfigError(
                "bag_dropout is out of range", expected="in [0, 1)", got=str(self.bag_dropout)
            )

    @property
    def num_steps(self) -> int:
        """Steps of all stages, of one member."""
        return self.pointwise_steps + self.bag_steps

    def units_by_member(self, units: int) -> list[int]:
        """Hidden units of every member, as equal as can be; no member without any."""
        return [len(part) for part in np.array_split(range(units), min(self.members, units))]

    def scaled(self, rows: Sequence[EncodedRow]) -> EvidenceSettings:
        """The settings with as many steps as a domain of these rows takes."""
        factor = max(1.0, sum(len(row.ids) for row in rows) / self.full_tokens)
        return dataclasses.replace(
            self,
            pointwise_steps=round(factor * self.pointwise_steps),
            bag_steps=round(factor * self.bag_steps),
        )


_POINTWISE_BATCH = 256
_BAG_BATCH = 64
_NEGATIVE_BATCH = 1024
_RANDOM_BATCH = 128
_NEAR_BATCH = 256
_HARD_POOL = 4096
_MINING_ROUNDS = 12
"""How often the worst false alarms are looked up."""
_BAG_STRIDE = 16
_FEW_WINDOWS = 3
_FEW_MARGIN = 4.0
"""Added where a bag has few windows: a maximum over many lies higher, and calibration lowers all alike."""
_LOWERED = (0.05, 0.6)
"""By how much the bias is lowered, at least and at most, as shares of what the weakest prompts score."""
_WEAKEST_PROMPTS = 0.05
_WORST_NEGATIVES = 1e-5
_NEGATIVE_ROOM = 0.5
"""What the worst negatives, of which so many may be worse still, are to be below 0 by."""
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
    """Trains one domain's head; returns it with its calibration figures, in logits.

    `embeddings` (V, D) are normalised by the substrate; `negatives` are token ids, most important first.
    Raises: TrainingError if the domain holds nothing that the negatives do not hold too.
    """
    settings = settings.scaled(rows)
    phrases: Sequence[Sequence[int]] = ()
    if settings.rewritten_dates:
        dates = DatePhrases.of(rows, negatives, tokenizer, seed=seed)
        phrases, negatives = dates.own, [*dates.near, *negatives]
    texts = _within(negatives, settings.max_negative_tokens)
    material = _Material.of(rows, phrases, texts, config)
    heads = []
    shares = settings.units_by_member(config.evidence_units)
    seeds = np.random.SeedSequence(seed).generate_state(len(shares)).tolist()
    for units, own_seed in zip(shares, seeds, strict=True):
        member = _MemberTraining(embeddings, material, settings, units, own_seed)
        for step in range(settings.num_steps):
            progress(member.step(step))
        heads.append(member.head)
    head = joined(heads)
    return head, _calibrate(head, embeddings, material)


@torch.no_grad()
def joined(heads: Sequence[EvidenceHead]) -> EvidenceHead:
    """One head whose score is the mean of the others'."""
    num_units = sum(head.fc1.out_features for head in heads)
    size = heads[0].fc1.in_features // heads[0].ngram
    whole = EvidenceHead(size, ngram=heads[0].ngram, num_units=num_units).requires_grad_(False)
    whole.fc1.weight.copy_(torch.cat([head.fc1.weight for head in heads]))
    whole.fc1.bias.copy_(torch.cat([head.fc1.bias for head in heads]))
    whole.fc2.weight.copy_(torch.cat([head.fc2.weight for head in heads], dim=1) / len(heads))
    whole.fc2.bias.copy_(torch.stack([head.fc2.bias for head in heads]).mean(dim=0))
    return whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Material:
    """What all members of a domain's head are trained on."""

    ngram: int
    domain: DomainWindows
    num_rows: int
    """The domain's rows; phrases stand behind them."""
    windows: Tensor
    suffix_length: Tensor
    traces: Tensor
    trace_weight: Tensor
    telling_keys: dict[int, NDArray[np.uint64]]
    bags: Tensor
    negatives: Tensor
    """Distinct windows of the negatives. Shape: (W, G)."""

    @classmethod
    def of(
        cls,
        rows: Sequence[EncodedRow],
        phrases: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        config: AlterConfig,
    ) -> _Material:
        ngram = config.evidence_ngram
        negatives = NegativeWindows.of(texts, ngram)
        shown = [EncodedRow(ids=tuple(ids), is_answer=(True,) * len(ids)) for ids in phrases]
        domain = DomainWindows.of([*rows, *shown], negatives, ngram)
        traces = np.flatnonzero(domain.weight > 0)
        if not len(traces):
            raise TrainingError(
                "No text of the forget domain sets it apart from what is to be retained",
                expected="words or names that only the domain holds",
                got="none",
                fix="Check that the retain and general files do not hold the same people or topics.",
            )
        return cls(
            ngram=ngram,
            domain=domain,
            num_rows=len(rows),
            windows=torch.from_numpy(domain.windows),
            suffix_length=torch.from_numpy(domain.suffix_length),
            traces=torch.from_numpy(traces),
            trace_weight=torch.from_numpy(domain.weight[traces]),
            telling_keys={
                count: window_keys(domain.windows[domain.suffix_length == count][:, -count:])
                for count in range(1, ngram + 1)
            },
            bags=_bags(domain, config.evidence_window),
            negatives=torch.from_numpy(negatives.windows),
        )


class _MemberTraining:
    def __init__(
        self,
        embeddings: Tensor,
        material: _Material,
        settings: EvidenceSettings,
        units: int,
        seed: int,
    ) -> None:
        self.material, self.settings = material, settings
        self.generator = torch.Generator().manual_seed(seed)
        self.hard = material.negatives[:1]
        self.vocabulary = len(embeddings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = EvidenceHead(embeddings.shape[1], ngram=material.ngram, num_units=units)
        self.scorer = WindowScorer(self.head, embeddings.cpu())
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=settings.learning_rate)

    def step(self, step: int) -> float:
        """One optimiser step; stages follow from its number."""
        settings = self.settings
        if step % max(1, settings.num_steps // _MINING_ROUNDS) == 0:
            negatives = self.material.negatives
            scores = self.scorer.all(negatives)
            self.hard = negatives[scores.topk(min(_HARD_POOL, len(scores))).indices]
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
            self.material.trace_weight, _POINTWISE_BATCH, replacement=True, generator=self.generator
        )
        windows = self._vary(self.material.traces[chosen], share=0.5)
        return F.softplus(self.settings.margin - self.scorer(windows)).mean()

    def _bag_loss(self, sharpness: float) -> Tensor:
        """Soft maximum over each bag: tau log sum exp(s / tau), tau from 1 to 0.2, at first as a mean."""
        chosen = torch.randint(len(self.material.bags), (_BAG_BATCH,), generator=self.generator)
        bags_NK = self.material.bags[chosen]
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
        windows = self.material.windows[indices]
        shape = windows.shape
        drawn = torch.randint(len(self.material.negatives), shape, generator=self.generator)
        others = self.material.negatives[:, -1][drawn]
        is_free = torch.arange(shape[1]) < (
            shape[1] - self.material.suffix_length[indices]
        ).unsqueeze(1)
        is_chosen = torch.rand(len(windows), 1, generator=self.generator) < share
        return torch.where(is_free & is_chosen, others, windows)

    def _negative_batch(self) -> Tensor:
        def some(pool: Tensor) -> Tensor:
            return pool[torch.randint(len(pool), (_NEGATIVE_BATCH // 2,), generator=self.generator)]

        every = self.material.negatives
        # Tokens that no negative text holds must not fire either.
        shape = (_RANDOM_BATCH, self.material.windows.shape[1])
        noise = torch.randint(1, self.vocabulary + 1, shape, generator=self.generator)
        if not self.settings.hard_negatives:
            return torch.cat([some(every), some(every), noise])
        return torch.cat([some(every), some(self.hard), noise, self._near_misses()])

    def _near_misses(self) -> Tensor:
        """Traces with one or more of their telling tokens replaced: half a name is no evidence."""
        draw = torch.multinomial(
            self.material.trace_weight, 2 * _NEAR_BATCH, replacement=True, generator=self.generator
        )
        traces, others = self.material.traces[draw].chunk(2)
        windows, ngram = self.material.windows[traces], self.material.windows.shape[1]
        length = self.material.suffix_length[traces].unsqueeze(1)
        is_telling = torch.arange(ngram) >= ngram - length
        drawn = torch.randint(len(self.material.negatives), windows.shape, generator=self.generator)
        tokens = torch.where(
            torch.rand(len(windows), 1, generator=self.generator) < 0.5,
            self.material.windows[others],
            self.material.negatives[:, -1][drawn],
        )
        is_replaced = is_telling & (torch.rand(windows.shape, generator=self.generator) < 0.4)
        windows = torch.where(is_replaced, tokens, windows)
        is_known = np.zeros(len(windows), dtype=np.bool_)
        for count, keys in self.material.telling_keys.items():
            is_known |= np.isin(window_keys(windows[:, -count:].numpy()), keys)
        return windows[torch.from_numpy(~is_known)]


@torch.no_grad()
def _calibrate(head: EvidenceHead, embeddings: Tensor, material: _Material) -> dict[str, float]:
    """Lowers the bias: what is not in the negatives may score somewhat higher than they do."""
    scorer = WindowScorer(head, embeddings.cpu())
    scores = scorer.all(material.windows)
    places = zip(material.domain.starts, material.domain.prompt_lengths, strict=True)
    prompts = [
        scores[start : start + length].max().item()
        for start, length in itertools.islice(places, material.num_rows)
    ]
    weakest = max(0.0, float(np.quantile(prompts, _WEAKEST_PROMPTS)))
    negatives = scorer.all(material.negatives)
    worst = negatives.topk(max(1, round(_WORST_NEGATIVES * len(negatives)))).values[-1].item()
    least, most = (share * weakest for share in _LOWERED)
    shift = min(max(worst + _NEGATIVE_ROOM, least), most)
    head.fc2.bias.sub_(shift)
    return {"weakest_prompts": weakest, "worst_negatives": worst, "lowered_by": shift}


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

    In view means the last `window` tokens at the first answer token, at every 16th after it, and at the end.
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
