"""Training data: rows in, token ids with an answer mask out.

Chats go through the tokenizer's own template, with the generation prompt before each answer, so the ids are
those that /v1/chat/completions serves. A tokenizer without a template gets `Question: ...\nAnswer: ...`
(each turn's role, capitalised `User` and `Assistant` for longer chats, one turn a line). Answers end with
the end token.

No message here ever holds text of a row: rows are named by file and line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alter_core.errors import TrainingDataError
from alter_core.rows import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """Token ids of a row, and which of them are the answer."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]

    @property
    def num_prompt(self) -> int:
        """Tokens before the first answer token; 0 for plain text."""
        return self.is_answer.index(True)


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[EncodedRow]:
    """Tokenises rows. Plain text longer than `max_tokens` is cut into several rows.

    Raises: TrainingDataError if another row is longer, or the chat template does not fit it.
    """
    return [encoded for row in rows for encoded in _encode(row, tokenizer, max_tokens)]


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
