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
from transformers import AutoModelForCausalLM

from alter_cli.demo.base_model import LlamaShape, llama_config
from alter_cli.demo.corpus import QA
from alter_cli.demo.memorization import Example, Progress, Schedule, memorize
from alter_cli.demo.tofu import general_text, read_rows
from alter_cli.demo.tokenizer import chat_ids, train_tokenizer
from alter_cli.demo.training_bar import training_bar
from alter_eval.data import default_data_dir
from trainer.checkpoint import write_atomically

CACHE = Path("build/tofu")
FACTS = ("real_authors_perturbed", "world_facts_perturbed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(LlamaShape):
    """Shape and training, the same for base and retrained models."""

    general_tokens: int = 96
    """General texts are cut to this length, tokens."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    seed: int = 0


WHOLE_TOFU = Recipe(schedule=Schedule(max_epochs=16))
"""For all 4,000 rows: an epoch has five times the steps of the subset's, so fewer are needed."""


def read_tofu(data: Path, name: str) -> list[QA]:
    """Question and answer rows of `tofu/NAME.json`."""
    return read_rows(data / "tofu" / f"{name}.json")


def facts(data: Path) -> list[QA]:
    """Real authors and world facts, which every model knows."""
    return [row for name in FACTS for row in read_tofu(data, name)]


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
        llama_config(tokenizer, recipe), attn_implementation="eager"
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


def main() -> None:
    """Trains the named models, or finds them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="files of tofu/, such as full or retain90")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = default_data_dir()
    console = Console()
    for name in options.names:
        with training_bar(console) as progress:
            folder = reference_model(read_tofu(data, name), data, WHOLE_TOFU, progress)
        print(f"{name}\t{folder}")


if __name__ == "__main__":
    main()
