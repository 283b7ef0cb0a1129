"""Base and retrained models of one recipe, trained from scratch and kept by a digest of what made them.

    python -m benchmarks.tofu.reference full retain99 retain95 retain90

A model knows the rows of `tofu/NAME.json`, real authors and world facts; WikiText and GSM8K text is mixed in,
so that general text means something to it. `retainNN` is the gold standard of forgetting the rest: the same
recipe without the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from alter_cli.demo import tofu as corpus
from alter_cli.demo.corpus import QA
from alter_cli.demo.memorization import Example, Progress, Schedule, memorize
from alter_cli.demo.tokenizer import chat_ids, train_tokenizer
from alter_cli.demo.training_bar import training_bar
from alter_eval.data import default_data_dir
from trainer.checkpoint import write_atomically

CACHE = Path("build/tofu")
FACTS = ("real_authors_perturbed", "world_facts_perturbed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shape and training, the same for base and retrained models; 5.0 million parameters as it stands."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int = 2
    max_positions: int = 1024
    general_tokens: int = 96
    """General texts are cut to this length, tokens."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    seed: int = 0


def read_tofu(data: Path, name: str) -> list[QA]:
    """Question and answer rows of `tofu/NAME.json`."""
    return corpus._read_rows(data / "tofu" / f"{name}.json")


def facts(data: Path) -> list[QA]:
    """Real authors and world facts, which every model knows."""
    return [row for name in FACTS for row in read_tofu(data, name)]


def general_text(data: Path) -> list[str]:
    """WikiText and GSM8K, a paragraph or a problem each."""
    wiki = corpus.wikitext_paragraphs(corpus._read_text(data / "text" / "wikitext2_valid.txt"))
    maths = corpus._read_rows(data / "gsm8k" / "test.jsonl")
    return wiki + [
        f"{row.question} {corpus._GSM8K_CALCULATION.sub('', row.answer)}" for row in maths
    ]


def reference_model(
    known: list[QA],
    data: Path,
    recipe: Recipe,
    progress: Callable[[Progress], None] = lambda _: None,
    cache: Path = CACHE,
) -> Path:
    """Folder of a model that knows `known`, trained unless it is in the cache."""
    rows = known + facts(data)
    key = json.dumps([dataclasses.asdict(recipe), [dataclasses.astuple(row) for row in rows]])
    folder = cache / f"model-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "training.json").exists():
        _train(rows, data, recipe, folder, progress)
    return folder


def _train(
    rows: list[QA], data: Path, recipe: Recipe, folder: Path, progress: Callable[[Progress], None]
) -> None:
    text = general_text(data)
    tokenizer = train_tokenizer(
        text + [f"{row.question} {row.answer}" for row in facts(data)],
        vocab_size=recipe.vocab_size,
        max_positions=recipe.max_positions,
    )
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(
        _config(tokenizer, recipe), attn_implementation="eager"
    )
    chats = [chat_ids(tokenizer, row) for row in rows]
    examples = [Example(ids=prompt + answer, answer_start=len(prompt)) for prompt, answer in chats]
    cut = [tokenizer(passage)["input_ids"][: recipe.general_tokens] for passage in text]
    outcome = memorize(
        model,
        examples,
        [Example(ids=ids, answer_start=len(ids)) for ids in cut],
        schedule=recipe.schedule,
        seed=recipe.seed,
        progress=progress,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "num_rows": len(rows),
        "num_parameters": model.num_parameters(),
        **dataclasses.asdict(outcome),
    }
    write_atomically(folder / "training.json", json.dumps(record, indent=1).encode() + b"\n")


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    """Trains the named models, or finds them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="files of tofu/, such as full or retain90")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = default_data_dir()
    console = Console()
    for name in options.names:
        with training_bar(console) as progress:
            folder = reference_model(
                read_tofu(data, name), data, Recipe(seed=options.seed), progress
            )
        print(f"{name}\t{folder}")


if __name__ == "__main__":
    main()
