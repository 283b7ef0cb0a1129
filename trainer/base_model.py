"""The frozen base model, its tokenizer and its identity.

Legend: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from alter_core.errors import ConfigError, UnsupportedModelError
from alter_core.fingerprint import BaseModelInfo
from alter_core.machine import fast_dtype

from .batches import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model as training sees it: no parameter of it ever takes a gradient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseModelInfo
    device: torch.device
    """Where the model lives."""
    dtype: torch.dtype
    """The checkpoint's, in which bundles are written too. The model computes in it, or in float32."""
    mixed_precision: str = "no"
    """`bf16`: forward passes run under autocast."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the model takes."""
        return int(self.model.config.max_position_embeddings)

    @property
    def pad_id(self) -> int:
        """A token id to pad with; masks hide it, so any will do."""
        return self.tokenizer.pad_token_id or 0

    def autocast(self) -> torch.autocast:
        """The context that forward passes run in."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision == "bf16"
        )

    def logits(self, batch: Batch) -> Tensor:
        """One forward pass, with whatever is attached to the model. Shapes: batch (B, T) -> (B, T, V)."""
        with self.autocast():
            logits: Tensor = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return logits

    def hidden_states(self, batch: Batch) -> Tensor:
        """The same up to the last hidden states, normed. Shapes: batch (B, T) -> (B, T, D)."""
        with self.autocast():
            hidden: Tensor = self.model.base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states. Shapes: (..., D) -> (..., V)."""
        with self.autocast():
            logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits


def load_base_model(
    folder: Path,
    *,
    device: str = "auto",
    mixed_precision: str = "no",
    has_double_backward: bool = False,
) -> BaseModel:
    """Loads a model folder, frozen, in its own dtype; in float32 on a processor that would emulate bfloat16.

    `has_double_backward` picks the attention that can be differentiated twice.
    Raises: UnsupportedModelError, ConfigError.
    """
    info = BaseModelInfo.from_folder(folder)
    if mixed_precision not in ("no", "bf16"):
        raise ConfigError("mixed_precision is unknown", expected="no or bf16", got=mixed_precision)
    place = _place(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            "The base model has no usable tokenizer",
            expected=f"tokenizer files in {folder}",
            got=type(error).__name__,
        ) from error
    with without_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager" if has_double_backward else "sdpa"
        )
    model.requires_grad_(False)
    model.eval()
    dtype = model.dtype
    if place.type == "cpu" and dtype == torch.bfloat16 and dtype != fast_dtype():
        model.float()
    return BaseModel(
        model=model.to(place),
        dtype=dtype,
        tokenizer=tokenizer,
        info=info,
        device=place,
        mixed_precision=mixed_precision,
    )


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """The bars are the run's own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _place(device: str) -> torch.device:
    """The device that accelerate chooses, or the one that is asked for."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError("device is unknown", expected="auto, cpu or cuda", got=device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "There is no CUDA device",
            expected="one that torch can see",
            got="none",
            fix="Use --device cpu.",
        )
    if device == "cpu":
        return torch.device("cpu")
    # Precision is a run's own matter: accelerate keeps one setting for the whole process.
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise ConfigError(
            "Training runs in one process",
            expected="1 process",
            got=f"{accelerator.num_processes}",
            fix="Start `alter train` itself, without `accelerate launch`.",
        )
    return torch.device(accelerator.device)
