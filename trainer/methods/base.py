"""What every unlearning method is made of: its settings, its losses, and what they may draw on.

A method is a frozen dataclass: hyper-parameters as fields, the loss as a function of them. Bases:

    Method         a loss on forgotten rows
    TokenMethod    ... that is a mean over tokens, so that tokens can be weighted (`weighting`)
    Retaining      ... beside a loss on retained rows; RetainNll and RetainKl are the common two

Legend: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter_core.rows import Row
from trainer.base_model import BaseModel
from trainer.batches import Batch, by_length, make_batch
from trainer.dataset import EncodedRow
from trainer.losses import weighted_mean

from .fields import check_positive, check_range
from .terms import mean_kl, mean_nll, sequence_nll
from .weighting import UniformWeighting, Weighting

_BATCH_TOKENS = 4096

ForgetLoss = Callable[[Batch], Tensor]
"""Loss of a batch of forgotten rows. Shapes: batch (B, T) -> ()."""
TokenLoss = Callable[[Tensor, Batch], Tensor]
"""Loss of every answer token, 0 elsewhere. Shapes: logits (B, T, V), batch (B, T) -> (B, T)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a method's losses may draw on: both models, and the rows."""

    model: BaseModel
    """The model that is trained."""
    load_copy: Callable[[], BaseModel]
    """Loads the base model anew, frozen, in the precision that `model` computes in."""
    rows: Sequence[Row]
    """Forgotten rows as text."""
    forget: Sequence[EncodedRow]
    """Forgotten rows; longer than `rows` where plain text was cut."""
    retain: Sequence[EncodedRow] = ()
    max_tokens: int
    """Longest row."""
    seed: int
    weighting: Weighting = dataclasses.field(default_factory=UniformWeighting)

    @functools.cached_property
    def reference(self) -> BaseModel:
        """The frozen base model, loaded when a loss first asks for it."""
        return self.load_copy()

    def batch(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> Batch:
        """The rows at `indices`, where the model is."""
        return make_batch(rows, indices, self.model.pad_id).to(self.model.device)

    @torch.no_grad()
    def reference_nll(self, rows: Sequence[EncodedRow]) -> Tensor:
        """`sequence_nll` of the base model, of every row. Shape: (rows,)."""
        found = torch.zeros(len(rows), device=self.model.device)
        for indices in by_length(rows, _BATCH_TOKENS):
            batch = self.batch(rows, indices)
            found[indices] = sequence_nll(self.reference.logits(batch), batch.labels)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A way to unlearn. Defaults are the papers', for large models; small ones need higher rates.

    Raises: ConfigError where a field is out of range.
    """

    learning_rate: float = 1e-5
    """Peak rate of AdamW: a linear rise over the first epoch, then a straight line to 0; > 0."""
    epochs: int = 5
    """How often every forgotten row is seen, > 0."""
    batch_rows: int = 8
    """Forgotten rows a step, and as many retained ones, > 0."""
    weight_decay: float = 0.01
    """Of AdamW, >= 0."""

    adapter_use: ClassVar[Literal["allowed", "required", "refused"]] = "allowed"
    """Whether the method may train an adapter instead of the weights."""

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "epochs", "batch_rows")
        check_range(self, "weight_decay", self.weight_decay >= 0, ">= 0")

    @abc.abstractmethod
    def forget_loss(self, task: Task) -> ForgetLoss:
        """Prepares what the loss needs, and returns it. `task.model` still is the base model then.

        Raises: TrainingDataError if the rows are not of a kind that the method can forget.
        """

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The weights that learn where there is no adapter: all of them.

        Raises: UnsupportedModelError, ConfigError where the method names some and the model lacks them.
        """
        return dict(model.named_parameters())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """A loss of single tokens: their weighted mean over the answer tokens of the batch, as published code
    averages. `weighting` says which tokens count, and how much.
    """

    @abc.abstractmethod
    def token_loss(self, task: Task) -> TokenLoss:
        """Prepares what the loss needs, and returns it."""

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""
        token_loss, weights = self.token_loss(task), task.weighting.start(task)

        def loss(batch: Batch) -> Tensor:
            hidden_BTD = task.model.hidden_states(batch)
            losses_BT = token_loss(task.model.head(hidden_BTD), batch)
            weights_BT = weights(batch, hidden_BTD.detach(), losses_BT.detach())
            return weighted_mean(losses_BT, weights_BT)

        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retaining(Method):
    """The loss is that of the forgotten rows plus `retain_weight` times that of retained ones."""

    retain_weight: float = 1.0
    """> 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "retain_weight")

    @abc.abstractmethod
    def retain_loss(self, task: Task, batch: Batch) -> Tensor:
        """Loss of a batch of retained rows. Shapes: batch (B, T) -> ()."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetainNll(Retaining):
    """Gradient descent on retained answers: their mean negative log-likelihood."""

    def retain_loss(self, task: Task, batch: Batch) -> Tensor:
        """See Retaining."""
        return mean_nll(task.model.logits(batch), batch.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetainKl(Retaining):
    """KL divergence of the trained model from the base model over every token of retained rows."""

    def retain_loss(self, task: Task, batch: Batch) -> Tensor:
        """See Retaining."""
        with torch.no_grad():
            reference = task.reference.logits(batch)
        return mean_kl(reference, task.model.logits(batch), batch.attention_mask)
