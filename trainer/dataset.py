"""Training data: JSON lines in, token ids with an answer mask out.

A line is one of

    {"question": ..., "answer": ...}       a user turn and the assistant's turn
    {"messages": [{"role", "content"}]}    a chat; every assistant turn is answer
    {"prompt": ..., "completion": ...}     raw text, no chat template, as /v1/completions sends it
    {"text": ...}                          plain text; every token is answer

Chats go through the tokenizer's own template, with the generation prompt before each answer, so the ids are
those that /v1/chat/completions serves. A tokenizer without a template gets `Question: ...\nAnswer: ...`
(each turn's role, capitalised `User` and `Assistant` for longer chats, one turn a line). Answers end with
the end token. Other fields of a line are ignored.

No message here ever holds text of a row: rows are named by file and line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alter_core.bundle import DataDigest
from alter_core.errors import TrainingDataError

_FORMATS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
_EXPECTED = '{"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}'
_MAX_NAMED_LINES = 5
"""So many lines are named in one message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a training file, checked, not yet tokenised."""

    file: Path
    line: int
    """1-based line number."""
    turns: tuple[tuple[str, str], ...]
    """(role, content); the roles are `prompt` and `completion`, or `text`, where no chat is meant."""

    @property
    def digest(self) -> str:
        """SHA-256 of the row's content, blind to surrounding white space."""
        canonical = [[role, content.strip()] for role, content in self.turns]
        return hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode()).hexdigest()

    @property
    def place(self) -> str:
        """File name and line, for messages."""
        return f"{self.file.name} line {self.line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """Token ids of a row, and which of them are the answer."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]

    @property
    def num_prompt(self) -> int:
        """Tokens before the first answer token; 0 for plain text."""
        return self.is_answer.index(True)


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Reads and checks training files.

    Raises: TrainingDataError naming file and line of the first problem.
    """
    rows = [row for path in paths for row in _read_file(path)]
    if not rows:
        raise TrainingDataError(
            "A training set is empty", expected="at least one row", got="no training file"
        )
    return rows


def check_disjoint(sets: Mapping[str, Sequence[Row]]) -> None:
    """Raises: TrainingDataError if two sets share a row; it names their lines, not their text."""
    owners: dict[str, tuple[str, Row]] = {}
    shared: list[str] = []
    for name, rows in sets.items():
        for row in rows:
            owner, first = owners.setdefault(row.digest, (name, row))
            if owner != name:
                shared.append(f"{first.place} ({owner}) = {row.place} ({name})")
    if shared:
        named = "; ".join(shared[:_MAX_NAMED_LINES])
        more = len(shared) - _MAX_NAMED_LINES
        raise TrainingDataError(
            "Training sets share rows, which cannot be forgotten and kept at once",
            expected="every row in one set",
            got=named + (f"; and {more} more" if more > 0 else ""),
            fix="Remove these lines from one of the files.",
        )


def data_digest(rows: Iterable[Row]) -> DataDigest:
    """Digest over the rows in order, independent of file names and of unread fields."""
    digests = [row.digest for row in rows]
    return DataDigest(
        sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest(), num_rows=len(digests)
    )


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[EncodedRow]:
    """Tokenises rows. Plain text longer than `max_tokens` is cut into several rows.

    Raises: TrainingDataError if another row is longer, or the chat template does not fit it.
    """
    return [encoded for row in rows for encoded in _encode(row, tokenizer, max_tokens)]


def _read_file(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingDataError(
            f"The training file {path} cannot be read", expected="a file", got=type(error).__name__
        ) from None
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise TrainingDataError(
            f"The training file {path} is empty", expected=_EXPECTED, got="nothing"
        )
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: bytes) -> Row:
    def refuse(problem: str, got: str) -> TrainingDataError:
        return TrainingDataError(
            f"{path.name} line {number}: {problem}", expected=_EXPECTED, got=got
        )

    if not line.strip():
        raise refuse("the line is empty", "nothing")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refuse("the line is not UTF-8", f"an invalid byte at {error.start}") from None
    except ValueError:
        raise refuse("the line is not JSON", "undecodable text") from None
    if not isinstance(value, dict):
        raise refuse("the line is no JSON object", f"a {type(value).__name__}")
    formats = [fields for fields in _FORMATS if fields[0] in value]
    if len(formats) != 1:
        got = "fields of several formats" if formats else "none of their fields"
        raise refuse("the line's format is unclear", got)
    fields = formats[0]
    if missing := [field for field in fields if field not in value]:
        raise refuse("a field is missing", f"no {missing[0]!r}")
    if fields == ("messages",):
        turns = _messages(value["messages"], refuse)
    else:
        roles = ("user", "assistant") if fields[0] == "question" else fields
        turns = tuple((role, value[field]) for role, field in zip(roles, fields, strict=True))
    for (_, content), field in zip(turns, fields, strict=False):
        if not isinstance(content, str):
            raise refuse(f"{field!r} is not text", f"a {type(content).__name__}")
    if any(0xD800 <= ord(char) < 0xE000 for _, content in turns for char in content):
        raise refuse("the line holds half a surrogate pair", "text that has no UTF-8 form")
    if not turns[-1][1].strip():
        raise refuse("the answer is empty", "an empty string")
    return Row(file=path, line=number, turns=turns)


def _messages(value: Any, refuse: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise refuse("'messages' is no list of turns", f"a {type(value).__name__}")
    turns = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise refuse("a message lacks a known role or text content", "something else")
        if role == "assistant" and not content.strip():
            raise refuse("the answer is empty", "an empty assistant turn")
        turns.append((role, content))
    if turns[-1][0] != "assistant" or len(turns) < 2:
        raise refuse("a chat must end with the assistant's answer", "no answer at its end")
    return tuple(turns)


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[EncodedRow]:
    if row.turns[0][0] == "text":
        ids = tokenizer(row.turns[0][1])["input_ids"]
        if len(ids) < 2:
            raise TrainingDataError(
                f"{row.place}: the text is too short",
                expected="at least 2 tokens",
                got=str(len(ids)),
            )
        return [
            EncodedRow(ids=tuple(piece), is_answer=(True,) * len(piece))
            for start in range(0, len(ids), max_tokens)
            if len(piece := ids[start : start + max_tokens]) > 1
        ]
    if row.turns[0][0] == "prompt":
        (_, prompt), (_, completion) = row.turns
        pieces = [(prompt, False), (completion, True)]
        use_special_tokens = True
    else:
        pieces = _render_chat(row, tokenizer)
        use_special_tokens = tokenizer.chat_template is None
    ids, is_answer = _join(pieces, tokenizer, use_special_tokens)
    if len(ids) > max_tokens:
        raise TrainingDataError(
            f"{row.place}: the row is too long",
            expected=f"at most {max_tokens} tokens",
            got=f"{len(ids)}",
            fix="Split the row, or raise --max-tokens up to the model's context length.",
        )
    return [EncodedRow(ids=tuple(ids), is_answer=tuple(is_answer))]


def _join(
    pieces: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, use_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """Tokenises piece by piece, as a server does: the prompt alone, then token after token.

    An answer ends with its end token: what a template puts behind it no model generates.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    for index, (text, piece_is_answer) in enumerate(pieces):
        piece = list(
            tokenizer(text, add_special_tokens=use_special_tokens and index == 0)["input_ids"]
        )
        num_answer = 0
        if piece_is_answer:
            is_last = index == len(pieces) - 1
            piece, num_answer = _end_answer(piece, tokenizer.eos_token_id, is_last)
        ids += piece
        is_answer += [place < num_answer for place in range(len(piece))]
    return ids, is_answer


def _end_answer(piece: list[int], eos: int | None, is_last: bool) -> tuple[list[int], int]:
    """An answer's tokens and how many of them are to be learned; the last answer always ends with `eos`."""
    if eos is not None and eos in piece:
        num_answer = piece.index(eos) + 1
        return (piece[:num_answer] if is_last else piece), num_answer
    if eos is not None and is_last:
        piece = [*piece, eos]
    return piece, len(piece)


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """(text, is answer) pieces whose concatenation is the whole chat."""
    if tokenizer.chat_template is None:
        return _render_plain(row)
    messages = [{"role": role, "content": content} for role, content in row.turns]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(row, tokenizer, messages[:index], True)
        full = _apply_template(row, tokenizer, messages[: index + 1], False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise TrainingDataError(
                f"{row.place}: the chat template rewrites earlier turns",
                expected="a template under which a longer chat begins with the shorter one",
                got="another beginning",
                fix="Give one question and answer a line.",
            )
        pieces += [(prompt[len(done) :], False), (full[len(prompt) :], True)]
        done = full
    return pieces


def _apply_template(
    row: Row, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], is_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )
    except Exception as error:  # templates raise what they like, with the text in the message
        raise TrainingDataError(
            f"{row.place}: the chat template refuses the row",
            expected="turns that the model's template knows",
            got=type(error).__name__,
        ) from None
    assert isinstance(text, str)
    return text


def _render_plain(row: Row) -> list[tuple[str, bool]]:
    if [role for role, _ in row.turns] == ["user", "assistant"]:
        return [(f"Question: {row.turns[0][1]}\nAnswer:", False), (f" {row.turns[1][1]}", True)]
    pieces = []
    for index, (role, content) in enumerate(row.turns):
        line_break = "\n" if index else ""
        if role == "assistant":
            pieces += [(f"{line_break}Assistant:", False), (f" {content}", True)]
        else:
            pieces.append((f"{line_break}{role.capitalize()}: {content}", False))
    return pieces
