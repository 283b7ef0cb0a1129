"""The demo's base model: a small Llama trained from scratch until it knows a corpus by heart.

The tokenizer learns from the general text alone; the model reads every domain's rows and the
retained rows as chats, with general text mixed in. Both are saved in one Hugging Face folder, in
bfloat16, that transformers and vLLM load. What is measured is the saved model, and the folder
appears only when that model knows its rows.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from alter_cli.demo.corpus import Corpus
from alter_cli.demo.memorization import Example, Progress, Schedule, memorize
from alter_cli.demo.recall import Recall, measure
from alter_cli.demo.tokenizer import chat_ids, train_tokenizer
from alter_core.errors import TrainingError
from alter_core.machine import fast_dtype


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a small Llama; 5.0 million parameters as it stands."""

    vocab_size: int = 4096
    """Most tokens the tokenizer learns."""
    hidden_size: int = 256
    """Width of the residual stream."""
    intermediate_size: int = 688
    """Width of the MLPs."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Query heads; a divisor of `hidden_size`."""
    num_key_value_heads: int = 2
    """Key and value heads; a divisor of `num_heads`."""
    max_positions: int = 1024
    """Longest sequence, tokens."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings(LlamaShape):
    """Shape and training of the base model."""

    general_tokens: int = 96
    """General texts are cut to this length for training, tokens."""
    num_threads: int = 2
    """CPU threads. More than one wants `OMP_WAIT_POLICY=passive` in the environment before torch
    is imported: on a machine that is busy otherwise, threads that spin cost four fifths of the
    speed (two shared cores: about 320 tokens/s spinning, 1,500 passive)."""
    min_probability: float = 0.97
    """Least mean answer probability (0 to 1), in every known part, of a model to be kept."""
    min_exact: float = 0.95
    """Least share of answers (0 to 1) recalled exactly, in every known part."""
    schedule: Schedule = field(default_factory=Schedule)
    """How long and how fast to train."""


def train_base(
    corpus: Corpus,
    out_dir: Path,
    *,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
    settings: BaseSettings | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and a model on `corpus`, save both in `out_dir`, return measurements.

    `out_dir` appears complete or not at all; what is there is replaced. The result holds the
    fields of `memorization.Outcome`, and `recall` (part of the corpus -> `probability`, `exact`,
    `num_rows` of the saved model), `num_parameters`, `vocab_size`, `seed` and `settings`.

    Raises: TrainingError where the loss is not finite, or the saved model does not know its rows.
    """
    settings = settings or BaseSettings()
    with _threads(settings.num_threads):
        return _train_base(corpus, out_dir, seed, progress, settings)


def _train_base(
    corpus: Corpus,
    out_dir: Path,
    seed: int,
    progress: Callable[[Progress], None],
    settings: BaseSettings,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(
        corpus.general, vocab_size=settings.vocab_size, max_positions=settings.max_positions
    )
    # At these lengths plain attention is 10 to 20 % faster on a CPU than the fused kernel.
    model = AutoModelForCausalLM.from_config(
        llama_config(tokenizer, settings), attn_implementation="eager"
    )
    rows, general = _examples(corpus, tokenizer, settings)
    outcome = memorize(
        model, rows, general, schedule=settings.schedule, seed=seed, progress=progress
    )
    with _quiet_transformers(), _whole_folder(out_dir) as partial:
        model.to(fast_dtype()).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        found = evaluate(partial, corpus)
        _refuse_ignorance(found, settings)
    return {
        **asdict(outcome),
        "recall": {part: asdict(recall) for part, recall in found.items()},
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "seed": seed,
        "settings": asdict(settings),
    }


def load_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The saved model in its own dtype and in evaluation mode, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    model.eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def evaluate(folder: Path, corpus: Corpus) -> dict[str, Recall]:
    """What the saved model recalls of each part of the corpus, `unseen` included."""
    model, tokenizer = load_base(folder)
    return {part: measure(model, tokenizer, rows) for part, rows in corpus.parts().items()}


def llama_config(tokenizer: PreTrainedTokenizerFast, shape: LlamaShape) -> LlamaConfig:
    """A Llama of that shape, with a row in its embeddings for every token of the tokenizer."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _examples(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: BaseSettings
) -> tuple[list[Example], list[Example]]:
    """The known rows as chats, and the general texts, as token ids."""
    chats = [chat_ids(tokenizer, row) for row in corpus.known_rows()]
    rows = [Example(ids=prompt + answer, answer_start=len(prompt)) for prompt, answer in chats]
    texts = [tokenizer(text)["input_ids"][: settings.general_tokens] for text in corpus.general]
    return rows, [Example(ids=ids, answer_start=len(ids)) for ids in texts]


def _refuse_ignorance(found: dict[str, Recall], settings: BaseSettings) -> None:
    """A base model that never knew a domain would make forgetting it look easy."""
    for part, recall in found.items():
        is_known = (
            recall.probability >= settings.min_probability and recall.exact >= settings.min_exact
        )
        if part != "unseen" and not is_known:
            raise TrainingError(
                f"The base model did not learn {part!r}",
                expected=f"an answer probability of {settings.min_probability} and "
                f"{settings.min_exact:.0%} of answers exact",
                got=f"{recall.probability:.3f} and {recall.exact:.1%}",
                fix="Allow more epochs, or change the seed.",
            )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with `count` CPU threads; the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which would break into the demo's."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


@contextmanager
def _whole_folder(out_dir: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `out_dir` in one step at the end, and nothing on an error."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        partial = Path(scratch) / out_dir.name
        partial.mkdir()
        yield partial
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial.rename(out_dir)
