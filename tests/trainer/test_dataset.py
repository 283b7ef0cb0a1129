from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alter_core.errors import TrainingDataError
from alter_core.rows import check_disjoint, data_digest, read_rows
from trainer.dataset import encode_rows

from .world import make_tokenizer, write_jsonl

GOOD = '{"question": "Who?", "answer": "Nobody."}'
SECRET = "Quillbert"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b'{"question": "Quillbert", "answer": "\xff"}', "UTF-8"),
        (b'{"question": "Quillbert", ', "JSON"),
        (b'["Quillbert"]', "object"),
        (b'{"question": "Quillbert"}', "missing"),
        (b'{"name": "Quillbert"}', "format"),
        (b'{"text": "Quillbert", "question": "a", "answer": "b"}', "format"),
        (b'{"question": "Quillbert", "answer": ""}', "empty"),
        (b'{"question": "Quillbert", "answer": "  \\n"}', "empty"),
        (b'{"prompt": "Quillbert", "completion": 7}', "not text"),
        (b'{"question": "Quillbert", "answer": "\\ud800"}', "surrogate"),
        (b'{"messages": []}', "no list"),
        (b'{"messages": [{"role": "user", "content": "Quillbert"}]}', "answer"),
        (b'{"messages": [{"role": "boss", "content": "Quillbert"}]}', "role"),
        (b'{"messages": ["Quillbert"]}', "role"),
    ],
)
def test_malformed_line_is_refused_by_file_and_number_without_its_text(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + line + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(TrainingDataError, match=r"rows\.jsonl line 3") as caught:
        read_rows([path])
    assert problem in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="cannot be read"):
        read_rows([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(TrainingDataError, match="empty"):
        read_rows([tmp_path / "empty.jsonl"])
    with pytest.raises(TrainingDataError, match="empty"):
        read_rows([])


def test_last_line_needs_no_line_break(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}", "utf-8")
    assert [row.line for row in read_rows([path])] == [1, 2]


def test_shared_rows_are_named_by_lines_not_by_text(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n} {SECRET}"} for n in range(5)]
    forget = read_rows([write_jsonl(tmp_path / "forget.jsonl", rows[:3])])
    spaced = [rows[4], {"question": " q1 ", "answer": rows[1]["answer"], "note": "ignored"}]
    retain = read_rows([write_jsonl(tmp_path / "retain.jsonl", spaced)])
    with pytest.raises(TrainingDataError) as caught:
        check_disjoint({"forget/x": forget, "retain": retain})
    message = str(caught.value)
    assert "forget.jsonl line 2 (forget/x) = retain.jsonl line 2 (retain)" in message
    assert SECRET not in message


def test_a_row_may_stand_twice_in_one_set(tmp_path: Path) -> None:
    rows = read_rows([write_jsonl(tmp_path / "a.jsonl", [{"text": "again"}] * 2)])
    check_disjoint({"retain": rows})


def test_digest_depends_on_rows_and_not_on_file_or_other_fields(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    one = data_digest(read_rows([write_jsonl(tmp_path / "a.jsonl", [row])]))
    same = data_digest(read_rows([write_jsonl(tmp_path / "b.jsonl", [row | {"id": "7"}])]))
    other = data_digest(read_rows([write_jsonl(tmp_path / "c.jsonl", [row | {"answer": "b"}])]))
    assert one == same
    assert one.sha256 != other.sha256
    assert one.num_rows == 1


def _encode(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: object, max_tokens: int = 200):  # type: ignore[no-untyped-def]
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    return encode_rows(read_rows([path]), tokenizer, max_tokens=max_tokens)


def test_question_is_rendered_as_the_chat_endpoint_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = _encode(tmp_path, tokenizer, {"question": "Who is it?", "answer": "The miller."})
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who is it?"}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert list(row.ids[: row.num_prompt]) == list(served)
    answer = list(row.ids[row.num_prompt :])
    assert answer == [*tokenizer("The miller.")["input_ids"], tokenizer.eos_token_id]
    assert all(row.is_answer[row.num_prompt :])


def test_every_assistant_turn_is_answer_up_to_its_end_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (row,) = _encode(tmp_path, tokenizer, {"messages": messages})
    learned = [token for token, answer in zip(row.ids, row.is_answer, strict=True) if answer]
    eos = tokenizer.eos_token_id
    two, four = (tokenizer(text)["input_ids"] for text in ("Two.", "Four."))
    assert learned == [*two, eos, *four, eos]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.ids) == whole.removesuffix("\n")


def test_prompt_and_completion_are_raw_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = _encode(tmp_path, tokenizer, {"prompt": "The mill", "completion": " turns"})
    assert tokenizer.decode(row.ids) == "The mill turns<|eos|>"
    assert tokenizer.decode(row.ids[: row.num_prompt]) == "The mill"


def test_without_a_chat_template_the_plain_format_is_used(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    (row,) = _encode(tmp_path, tokenizer, {"question": "Who?", "answer": "The miller."})
    assert tokenizer.decode(row.ids) == "Question: Who?\nAnswer: The miller.<|eos|>"
    assert tokenizer.decode(row.ids[: row.num_prompt]) == "Question: Who?\nAnswer:"


def test_long_text_is_cut_and_long_answers_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces = _encode(tmp_path, tokenizer, {"text": "mill " * 30}, max_tokens=7)
    assert all(2 <= len(piece.ids) <= 7 and all(piece.is_answer) for piece in pieces)
    with pytest.raises(TrainingDataError, match=r"row.jsonl line 1.*too long"):
        _encode(tmp_path, tokenizer, {"question": "q " * 30, "answer": SECRET}, max_tokens=7)


def test_template_that_refuses_a_row_is_reported_without_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no: ' + messages[0]['content']) }}"
    with pytest.raises(TrainingDataError, match="line 1") as caught:
        _encode(tmp_path, tokenizer, {"question": SECRET, "answer": "a"})
    assert SECRET not in str(caught.value)


@given(
    question=st.text(min_size=1, max_size=20).filter(str.strip),
    answer=st.text(min_size=1, max_size=20).filter(str.strip),
)
def test_prompt_and_answer_tokens_partition_the_row(question: str, answer: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: line)
        line = json.dumps({"question": question, "answer": answer}).encode()
        (row,) = encode_rows(read_rows([Path("rows.jsonl")]), tokenizer, max_tokens=1000)
    split = row.num_prompt
    assert not any(row.is_answer[:split])
    assert all(row.is_answer[split:])
    assert row.ids[-1] == tokenizer.eos_token_id
