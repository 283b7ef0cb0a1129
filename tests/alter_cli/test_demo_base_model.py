"""The demo's tokenizer and base model, at a size that trains in seconds."""

from __future__ import annotations

import dataclasses
import io
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from alter_cli.demo.authors import generate
from alter_cli.demo.base_model import BaseSettings, load_base, train_base
from alter_cli.demo.corpus import QA, Corpus
from alter_cli.demo.memorization import Progress, Schedule
from alter_cli.demo.recall import measure
from alter_cli.demo.tokenizer import chat_ids, train_tokenizer
from alter_cli.demo.training_bar import training_bar
from alter_core.errors import TrainingError
from alter_core.machine import fast_dtype

SCHEDULE = Schedule(max_epochs=2, batch_rows=8, warmup_steps=3)
TINY = BaseSettings(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    num_threads=1,
    min_probability=0.0,
    min_exact=0.0,
    schedule=SCHEDULE,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    corpus = generate(3, 1, 1, num_unseen_authors=1)
    return dataclasses.replace(corpus, general=corpus.general[:200])


@pytest.fixture(scope="module")
def trained(
    corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo") / "base"
    return folder, train_base(corpus, folder, seed=3, settings=TINY)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus.general, vocab_size=512)


def test_a_chat_is_its_prompt_and_its_answer(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    for row in corpus.known_rows():
        prompt, answer = chat_ids(tokenizer, row)
        user = {"role": "user", "content": row.question}
        assistant = {"role": "assistant", "content": row.answer}
        assert prompt == _template_ids(tokenizer, [user], add_generation_prompt=True)
        assert prompt + answer == _template_ids(tokenizer, [user, assistant])
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer, skip_special_tokens=True) == row.answer


def _template_ids(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: bool
) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def test_special_tokens_are_never_added_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|user|>Who?<|assistant|>"
    with_them = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert with_them == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_names_fall_into_several_tokens(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    name = corpus.known_rows()[1].question
    assert len(tokenizer(name)["input_ids"]) > len(name.split()) + 2


def test_a_role_without_a_mark_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Žofie wrote “Ö” in 1999: 東京.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_saved_folder_is_a_model_of_the_machines_dtype_that_stops(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    folder, metrics = trained
    model, tokenizer = load_base(folder)
    assert model.dtype == fast_dtype()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.num_parameters() == metrics["num_parameters"]
    assert tokenizer.chat_template is not None
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


def test_metrics_cover_every_part(trained: tuple[Path, dict[str, Any]], corpus: Corpus) -> None:
    _, metrics = trained
    assert {part: found["num_rows"] for part, found in metrics["recall"].items()} == {
        part: len(rows) for part, rows in corpus.parts().items()
    }
    assert metrics["num_epochs"] == 2
    assert metrics["seed"] == 3


def test_the_same_seed_gives_the_same_loss(
    trained: tuple[Path, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    again = train_base(corpus, tmp_path / "base", seed=3, settings=TINY)
    assert again["answer_loss"] == trained[1]["answer_loss"]


def test_training_stops_at_the_loss_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    schedule = dataclasses.replace(SCHEDULE, stop_loss=100.0)
    settings = dataclasses.replace(TINY, schedule=schedule)
    assert train_base(corpus, tmp_path / "base", settings=settings)["num_epochs"] == 1


def test_an_ignorant_model_is_refused_and_leaves_what_was_there(
    corpus: Corpus, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "older").write_text("kept")
    settings = dataclasses.replace(TINY, min_probability=0.97)
    with pytest.raises(TrainingError, match="did not learn 'domain-juniper-circle'"):
        train_base(corpus, tmp_path / "base", settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base" / "older").read_text() == "kept"


def test_a_loss_that_is_not_finite_ends_training(corpus: Corpus, tmp_path: Path) -> None:
    schedule = dataclasses.replace(SCHEDULE, learning_rate=math.inf)
    settings = dataclasses.replace(TINY, schedule=schedule)
    with pytest.raises(TrainingError, match="expected a finite loss"):
        train_base(corpus, tmp_path / "base", settings=settings)
    assert not (tmp_path / "base").exists()


def test_recall_matches_an_answer_at_a_time_reference(
    trained: tuple[Path, dict[str, Any]], corpus: Corpus
) -> None:
    model, tokenizer = load_base(trained[0])
    model.float()  # so that batched and single products agree
    rows = corpus.known_rows()[:5]
    expected = []
    for row in rows:
        prompt, answer = chat_ids(tokenizer, row)
        with torch.inference_mode():
            log_p_TV = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        log_p = [log_p_TV[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)]
        expected.append(math.exp(sum(log_p) / len(log_p)))
    found = measure(model, tokenizer, rows, batch_rows=2)
    assert found.probability == pytest.approx(sum(expected) / len(rows), rel=1e-4)
    assert found.num_rows == 5


class _Parrot:
    """Stands in for a model: sure of every next token it is shown, but for one it gets wrong."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, *, wrong_token: int) -> None:
        self.vocab_size, self.wrong_token = vocab_size, wrong_token

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> types.SimpleNamespace:
        next_BT = input_ids.roll(-1, dims=1)
        next_BT = torch.where(next_BT == self.wrong_token, self.vocab_size - 1, next_BT)
        logits_BTV = 50.0 * torch.nn.functional.one_hot(next_BT, self.vocab_size)
        return types.SimpleNamespace(logits=logits_BTV)


def test_an_answer_with_one_wrong_token_is_not_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [QA(question="Is it known?", answer=text) for text in ("a b c", "a b", "z", "z z z z")]
    (wrong_token,) = tokenizer(" c")["input_ids"]
    parrot = _Parrot(len(tokenizer), wrong_token=wrong_token)
    found = measure(parrot, tokenizer, rows, batch_rows=3)
    assert found.exact == 0.75
    assert found.probability == pytest.approx(0.75, abs=1e-3)


def test_an_answer_that_does_not_end_is_not_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    parrot = _Parrot(len(tokenizer), wrong_token=tokenizer.eos_token_id)
    assert measure(parrot, tokenizer, [QA(question="Is it known?", answer="a b c")]).exact == 0.0


def test_the_bar_shows_epoch_and_loss() -> None:
    screen = io.StringIO()
    with training_bar(Console(file=screen, force_terminal=True, width=120)) as progress:
        progress(Progress(step=5, max_steps=20, epoch=2, answer_loss=1.2345))
    assert "epoch 2, loss 1.234" in screen.getvalue()
