from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sacrebleu", reason="needs the extra `eval`")

from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from alter_core.errors import EvaluationError
from alter_eval import muse
from alter_eval.models import TransformersModel
from trainer.base_model import BaseModel

from .small_benchmarks import SECRETS, write_json, write_muse
from .small_tofu import StubModel

TOKENS = 25
"""Where the small texts are cut."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_muse(tmp_path) / "muse" / "news"


def logs_of(base: BaseModel, folder: Path) -> dict[str, muse.RowsLog]:
    data = muse.read_corpus(folder)
    parts = muse.parts_of(
        TransformersModel(base), data, prefix_tokens=TOKENS, max_tokens=base.max_tokens
    )
    return {name: work() for name, work in parts.items()}  # type: ignore[misc]


def test_a_corpus_is_read(folder: Path) -> None:
    data = muse.read_corpus(folder)
    records = json.loads((folder / "verbmem" / "forget.json").read_text())
    assert data.verbatim == [record["prompt"] + record["gt"] for record in records]
    assert {side: len(rows) for side, rows in data.knowledge.items()} == {"forget": 4, "retain": 4}
    assert {side: len(rows) for side, rows in data.examples.items()} == {"forget": 2, "retain": 2}
    assert {name: len(texts) for name, texts in data.membership.items()} == {
        "forget": 6,
        "holdout": 7,
    }
    short = muse.read_corpus(folder, limit=3)
    assert short.verbatim == data.verbatim[:3]
    assert len(short.membership["holdout"]) == len(short.knowledge["retain"]) == 3
    assert short.examples == data.examples
    assert short.digest != data.digest


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("verbmem/forget.json", {"prompt": "Zofia Quillbert"}),
        ("knowmem/retain_qa.json", {"question": "Zofia Quillbert", "answer": 3}),
        ("knowmem/forget_qa_icl.json", "Zofia Quillbert"),
        ("privleak/holdout.json", {"text": "Zofia Quillbert"}),
        ("privleak/forget.json", " "),
    ],
)
def test_a_row_that_does_not_fit_is_named_without_its_text(
    folder: Path, file: str, row: Any
) -> None:
    rows = json.loads((folder / file).read_text())
    write_json(folder / file, [*rows[:2], row])
    name = Path(file).name
    with pytest.raises(EvaluationError, match=rf"{name} row 3.*ALTER_DATA_DIR") as caught:
        muse.read_corpus(folder)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize("file", ["verbmem/forget.json", "knowmem/forget_qa_icl.json"])
@pytest.mark.parametrize("content", [None, "", "{}", "[]", "no JSON"])
def test_a_file_without_rows_is_named(folder: Path, file: str, content: str | None) -> None:
    path = folder / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(EvaluationError, match=path.name):
        muse.read_corpus(folder)


class Recorder(StubModel):
    """Says the same to every prompt, and keeps what it was asked."""

    def __init__(self, base: BaseModel, said: str) -> None:
        super().__init__(base.tokenizer)
        self.said = list(base.tokenizer(said)["input_ids"])
        self.asked: list[str] = []

    def complete(self, prompts: Any, *, max_new_tokens: int) -> list[list[int]]:
        self.max_new_tokens = max_new_tokens
        self.asked += [self.tokenizer.decode(list(ids)) for ids in prompts]
        return [self.said for _ in prompts]


def test_a_text_is_completed_from_its_first_tokens(base: BaseModel) -> None:
    text = "The river runs past the mill and turns the old wheel all day long."
    ids = base.tokenizer(text)["input_ids"]
    model = Recorder(base, "the old wheels turn")
    log = muse.evaluate_verbatim(model, [text], prefix_tokens=5)
    assert model.asked == [base.tokenizer.decode(ids[:5])]
    assert model.max_new_tokens == 128
    rest = base.tokenizer.decode(ids[5:])
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    assert log.rows[0]["rouge_l"] == scorer.score(rest, "the old wheels turn")["rougeL"].fmeasure
    assert 0 < log.rows[0]["rouge_l"] < 1
    exact = muse.evaluate_verbatim(Recorder(base, rest), [text], prefix_tokens=5)
    assert exact.rows[0] == pytest.approx({"rouge_l": 1.0, "bleu": 1.0})
    assert exact.dataset == log.dataset
    other = muse.evaluate_verbatim(model, [text], prefix_tokens=6)
    assert other.dataset != log.dataset


def test_a_text_that_ends_before_the_cut_is_refused(base: BaseModel) -> None:
    num_tokens = len(base.tokenizer("The river")["input_ids"])
    with pytest.raises(EvaluationError, match=rf"Row 2 of verbmem.*got {num_tokens}, and 1 such"):
        muse.evaluate_verbatim(
            StubModel(base.tokenizer), ["The river runs far", "The river"], prefix_tokens=num_tokens
        )


def test_questions_follow_examples_and_end_where_the_next_would_begin(base: BaseModel) -> None:
    model = Recorder(base, "The town of Hull.\n\nQuestion: Who?")
    log = muse.evaluate_knowledge(
        model, [("Where?", "The town of Hull."), ("When?", "8 October")], [("P?", "B")]
    )
    assert model.asked[1] == "Question: P?\nAnswer: B\n\nQuestion: When?\nAnswer: "
    assert model.max_new_tokens == 32
    assert log.column("rouge_l") == [1.0, 0.0]


def test_membership_texts_are_cut_to_what_the_model_takes(base: BaseModel) -> None:
    class Lengths(StubModel):
        def score(self, rows: Any) -> Any:
            self.lengths = [len(row.ids) for row in rows]
            return super().score(rows)

    model = Lengths(base.tokenizer)
    muse.evaluate_membership(model, ["word " * 90, "word"], max_tokens=40)
    assert model.lengths[0] == 40
    assert model.lengths[1] < 40


@pytest.fixture(scope="module")
def both(
    exact_base: BaseModel, ignorant_base: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, muse.RowsLog], dict[str, muse.RowsLog]]:
    """Logs of a model that was trained on the texts, and of one that was not."""
    folder = write_muse(tmp_path_factory.mktemp("muse")) / "muse" / "news"
    return logs_of(exact_base, folder), logs_of(ignorant_base, folder)


def test_figures_tell_a_model_that_knows_the_texts(
    both: tuple[dict[str, muse.RowsLog], dict[str, muse.RowsLog]],
) -> None:
    knowing, ignorant = both
    found, expected = muse.figures(knowing), muse.figures(ignorant)
    for name in ("verbmem_rouge_l", "verbmem_bleu", "min_k_auc"):
        assert (found[name] or 0) > (expected[name] or 0) + 0.2, name
    members = knowing["privleak_forget"].column("min_k")
    others = knowing["privleak_holdout"].column("min_k")
    auc = roc_auc_score([1] * len(members) + [0] * len(others), members + others)
    assert found["min_k_auc"] == pytest.approx(auc)
    assert found["asg"] is None
    assert found["privleak"] is None


def test_against_the_retrained_model_there_are_gap_and_privleak(
    both: tuple[dict[str, muse.RowsLog], dict[str, muse.RowsLog]],
) -> None:
    knowing, ignorant = both
    figures, reference = muse.figures(knowing, ignorant), muse.figures(ignorant)
    gaps = [
        abs((figures[name] or 0) - (reference[name] or 0))
        for name in ("verbmem_bleu", "verbmem_rouge_l")
    ]
    assert figures["asg"] == pytest.approx(statistics.fmean(gaps))
    auc, reference_auc = figures["min_k_auc"] or 0, reference["min_k_auc"] or 0
    expected = (reference_auc - auc) / (1 - reference_auc) * 100
    assert figures["privleak"] == pytest.approx(expected)
    same = muse.figures(ignorant, ignorant)
    assert same["asg"] == same["privleak"] == 0


def test_without_texts_for_it_there_is_no_privleak(base: BaseModel, tmp_path: Path) -> None:
    folder = write_muse(tmp_path, has_membership=False) / "muse" / "news"
    data = muse.read_corpus(folder, limit=2)
    parts = muse.parts_of(
        StubModel(base.tokenizer), data, prefix_tokens=TOKENS, max_tokens=base.max_tokens
    )
    logs: Any = {name: work() for name, work in parts.items()}
    figures = muse.figures(logs, logs)
    assert figures["min_k_auc"] is figures["privleak"] is None
    assert figures["asg"] == 0
    assert "privleak/ is not in the data folder" in muse.not_measured(True)["privleak"]
    assert "--retrained" in muse.not_measured(False)["privleak"]


def test_logs_of_other_rows_are_not_compared(
    both: tuple[dict[str, muse.RowsLog], dict[str, muse.RowsLog]],
) -> None:
    knowing, ignorant = both
    other = ignorant | {"verbmem": ignorant["verbmem"].model_copy(update={"dataset": "x" * 64})}
    with pytest.raises(EvaluationError, match="another dataset"):
        muse.figures(knowing, other)
