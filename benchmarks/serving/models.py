"""Llamas of random weights and a tokenizer that learned from Python's own prose: nothing is downloaded.

The same seed gives the same tokenizer and weights under the same versions of Python and torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alter_cli.demo.base_model import LlamaShape, llama_config
from alter_cli.demo.general_text import python_prose
from alter_cli.demo.tokenizer import train_tokenizer

_MAX_POSITIONS = 4096

SHAPES = {
    "25m": LlamaShape(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=6,
        num_heads=8,
        num_key_value_heads=4,
        max_positions=_MAX_POSITIONS,
    ),
    "150m": LlamaShape(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=12,
        num_heads=16,
        num_key_value_heads=4,
        max_positions=_MAX_POSITIONS,
    ),
}
"""26.1 and 152.1 million parameters, heads of 64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Llama that its serving cost follows from."""

    hidden: int
    intermediate: int
    num_layers: int
    qkv: int
    """Stacked outputs of the q, k and v projections."""
    vocabulary: int

    @classmethod
    def of(cls, shape: LlamaShape) -> Sizes:
        """Of one of our models."""
        head = shape.hidden_size // shape.num_heads
        return cls(
            hidden=shape.hidden_size,
            intermediate=shape.intermediate_size,
            num_layers=shape.num_layers,
            qkv=head * (shape.num_heads + 2 * shape.num_key_value_heads),
            vocabulary=shape.vocab_size,
        )

    @property
    def sites(self) -> tuple[tuple[int, int], ...]:
        """(features in, features out) of a layer's four adapted inputs: qkv, o, gate_up, down."""
        return (
            (self.hidden, self.qkv),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        )

    @property
    def linear_parameters(self) -> int:
        """Of all linears of the layers and the output head: what a token is multiplied with."""
        layers = self.num_layers * sum(size_in * size_out for size_in, size_out in self.sites)
        return layers + self.hidden * self.vocabulary

    @property
    def num_parameters(self) -> int:
        """All of them: the linears, an embedding table of its own, and the norms."""
        norms = (2 * self.num_layers + 1) * self.hidden
        return self.linear_parameters + self.hidden * self.vocabulary + norms


def save_model(folder: Path, shape: LlamaShape, *, seed: int) -> None:
    """Writes tokenizer and bfloat16 weights in one Hugging Face folder."""
    tokenizer = train_tokenizer(
        python_prose(), vocab_size=shape.vocab_size, max_positions=shape.max_positions
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(llama_config(tokenizer, shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prose_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The prose as one row of token ids."""
    return [token for ids in tokenizer(list(python_prose()))["input_ids"] for token in ids]
