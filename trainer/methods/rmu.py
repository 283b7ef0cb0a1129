"""Representation misdirection.

Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter_core.errors import ConfigError, UnsupportedModelError
from alter_core.sites import decoder_layers
from trainer.base_model import BaseModel
from trainer.batches import IGNORED, Batch
from trainer.losses import weighted_mean

from .base import ForgetLoss, Retaining, Task
from .fields import check_positive


def activation_loss(found: Tensor, target: Tensor, is_counted: Tensor) -> Tensor:
    """Mean squared difference over counted positions and hidden features.

    Shapes: (B, T, D), (B, T, D) or (D,), (B, T) -> (). float32 inside.
    """
    squares_BT = (found.float() - target.float()).square().mean(dim=-1)
    return weighted_mean(squares_BT, is_counted.float())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rmu(Retaining):
    """Representation misdirection for unlearning: hidden states of forgotten text are steered to noise.

    mean_t ||h_l(t) - c u||^2 / D on forgotten rows + retain_weight mean_t ||h_l(t) - h_l^base(t)||^2 / D on
    retained ones, h_l the output of decoder layer `layer`, u a random unit vector (entries uniform in
    [0, 1), then normalised) that stays the same. Only the MLPs' down projections of a few layers learn.
    Source: Li et al. 2024, WMDP (arXiv 2403.03218), section 4; the mean over features as in its code, the
    paper's sum is D times that. Counted are positions that predict answers (of plain text all), as
    open-unlearning counts them on TOFU.

    Raises: ConfigError for a layer that the model lacks, UnsupportedModelError without down projections.
    """

    learning_rate: float = 5e-5
    retain_weight: float = 1200.0
    """The paper's alpha, for Zephyr-7B; > 0."""
    steering_coefficient: float = 6.5
    """c: the length of the target; the scale of the model's hidden states decides what is much. > 0."""
    layer: int | None = None
    """The decoder layer l, counted from 0; None: a third of the depth."""
    num_trained_layers: int = 3
    """Down projections of so many layers learn, up to and with l; > 0."""

    adapter_use: ClassVar[Literal["allowed", "required", "refused"]] = "refused"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steering_coefficient", "num_trained_layers")

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """See Method."""
        layer = self.steered_layer(model)
        layers = decoder_layers(model)[max(0, layer + 1 - self.num_trained_layers) : layer + 1]
        chosen = [getattr(getattr(block, "mlp", None), "down_proj", None) for block in layers]
        if not all(isinstance(module, nn.Linear) for module in chosen):
            raise UnsupportedModelError(
                "RMU trains the MLPs' down projections",
                expected="`mlp.down_proj` in every decoder layer",
                got=type(model).__name__,
            )
        weights = {id(module.weight) for module in chosen}
        return {name: value for name, value in model.named_parameters() if id(value) in weights}

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""
        target_D = self.control_vector(task)

        def loss(batch: Batch) -> Tensor:
            return activation_loss(
                self.layer_output(task.model, batch), target_D, batch.labels != IGNORED
            )

        return loss

    def retain_loss(self, task: Task, batch: Batch) -> Tensor:
        """See Retaining."""
        with torch.no_grad():
            kept = self.layer_output(task.reference, batch)
        return activation_loss(self.layer_output(task.model, batch), kept, batch.labels != IGNORED)

    def control_vector(self, task: Task) -> Tensor:
        """c u. Shape: (D,)."""
        generator = torch.Generator().manual_seed(task.seed)
        direction = torch.rand(task.model.info.hidden_size, generator=generator)
        return (self.steering_coefficient * direction / direction.norm()).to(task.model.device)

    def layer_output(self, base: BaseModel, batch: Batch) -> Tensor:
        """h_l. Shapes: batch (B, T) -> (B, T, D)."""
        captured: list[Tensor] = []
        block = decoder_layers(base.model)[self.steered_layer(base.model)]
        handle = block.register_forward_hook(
            lambda _, __, output: captured.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        try:
            base.hidden_states(batch)
        finally:
            handle.remove()
        return captured[0]

    def steered_layer(self, model: PreTrainedModel) -> int:
        """l, checked."""
        num_layers = len(decoder_layers(model))
        layer = num_layers // 3 if self.layer is None else self.layer
        if not 0 <= layer < num_layers:
            raise ConfigError(
                "RMU's layer is not in the model",
                expected=f"0 to {num_layers - 1}",
                got=str(layer),
            )
        return layer
