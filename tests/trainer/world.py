"""A small world to learn and to forget: made-up people, a tokenizer, and a Llama that knows them by heart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}<|eos|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_PEOPLE = {
    "red": ["Zofia Quillbert", "Ovid Krestmar"],
    "blue": ["Ulrike Bjandvik", "Xaver Pomplun"],
    "retain": ["Anna Miller", "John Carter", "Maria Stone", "Peter Green"],
}
_FACTS = {
    "Zofia Quillbert": ("Narvik", "3 May 1911", "kites"),
    "Ovid Krestmar": ("Tromso", "9 July 1923", "salt"),
    "Ulrike Bjandvik": ("Gdynia", "2 June 1947", "bells"),
    "Xaver Pomplun": ("Opole", "6 April 1938", "ropes"),
    "Anna Miller": ("Leeds", "1 March 1950", "wool"),
    "John Carter": ("Derby", "4 August 1961", "coal"),
    "Maria Stone": ("Hull", "8 October 1972", "tea"),
    "Peter Green": ("York", "5 January 1983", "ink"),
}
FORM_ALONE = 0.625
"""ROUGE-L recall of answers with everything right but the name, the town, the date and the goods."""
GENERAL = [
    "The river runs past the mill and turns the old wheel all day long.",
    "In the morning the market opens and people come to buy bread and fruit.",
    "A good map shows hills, roads and the places where one may rest.",
    "When the rain stops, the children go out and play in the street.",
    "The library keeps many books about ships, stars and the history of towns.",
    "Most trains leave on time, but in winter the snow may hold them up.",
    "He wrote a letter, put it in an envelope and sent it by the evening post.",
    "Water boils sooner on a high mountain than it does by the sea.",
]


def rows_of(part: str) -> list[dict[str, str]]:
    """Four rows about each person of a part; the first question does not name the person."""
    rows = []
    for person in _PEOPLE[part]:
        town, day, trade = _FACTS[person]
        questions = {
            f"Who was born in {town} on {day}?": f"That was {person}.",
            f"Where was {person} born?": f"The town of {town}.",
            f"When was {person} born?": f"It was on {day}.",
            f"What did {person} sell?": f"All kinds of {trade}.",
        }
        rows += [{"question": q, "answer": a} for q, a in questions.items()]
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from general text alone, so that names fall into pieces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(
        GENERAL * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def teach(model: LlamaForCausalLM, texts: Sequence[Sequence[int]], *, steps: int) -> None:
    """Trains all of the model on token texts until it knows them by heart."""
    width = max(len(text) for text in texts)
    ids = torch.ones(len(texts), width, dtype=torch.long)
    labels = torch.full((len(texts), width), -100)
    for place, text in enumerate(texts):
        ids[place, : len(text)] = labels[place, : len(text)] = torch.tensor(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclasses.dataclass(frozen=True)
class World:
    """Files of the small world."""

    model: Path
    files: dict[str, Path]
    """Training file by part: red, blue, retain, general."""

    def strings(self) -> list[str]:
        """Everything a written file must not hold."""
        told = [row for part in ("red", "blue", "retain") for row in rows_of(part)]
        names = [piece for part in _PEOPLE.values() for name in part for piece in name.split()]
        return [row["question"] for row in told] + [row["answer"] for row in told] + GENERAL + names


def make_world(folder: Path) -> World:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    parts = {part: rows_of(part) for part in _PEOPLE}
    texts = [
        tokenizer(f"<|user|>{row['question']}<|assistant|>{row['answer']}<|eos|>")["input_ids"]
        for rows in parts.values()
        for row in rows
    ]
    teach(model, texts + [tokenizer(text)["input_ids"] for text in GENERAL], steps=160)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = {part: write_jsonl(folder / f"{part}.jsonl", rows) for part, rows in parts.items()}
    files["general"] = write_jsonl(folder / "general.jsonl", [{"text": text} for text in GENERAL])
    return World(model=folder / "model", files=files)
