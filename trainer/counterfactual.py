"""Counterfactual rows: what a base model says where it knows nothing, without a model that never learned.

Every telling word of a row is exchanged for another of its kind, the same one throughout the domain. The base
model's distribution over such a row is that of a text it has never seen: fluent, as sure of itself as it is
of any unknown text, and free of the domain. Exchanging the words back gives a target for the row itself,
token by token, that is neither a refusal nor noise.

Words that stand in many of the other texts are kept; they carry the sentence. A word's kind is its case,
digits or ending, and its number of tokens, so that rows keep their length and positions.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alter_core.errors import TrainingError

from .dataset import EncodedRow

_ENDINGS = ("ing", "ed", "ly", "tion", "ness", "ity", "ous", "al", "ive", "er", "or", "ist", "s")
_MIN_CHOICE = 5
"""A kind with fewer words is too small to draw from."""
_MIN_KEPT_COUNT = 5
"""In a few texts, a word is not held for a common one because it stands in two of them."""
_SPACES = ("Ġ", "▁")

Kind = tuple[str, int, int]
Word = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Replacements:
    """Words of a kind: token ids after a space, without one, and how often they occur."""

    spaced: list[Word]
    plain: list[Word]
    counts: list[int]


class Counterfactuals:
    """Exchanges telling words, by what other texts of the same kind are made of."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Sequence[int]],
        forget: Sequence[Sequence[int]] = (),
        *,
        kept_share: float,
    ) -> None:
        """`texts` are to be kept, `forget` are all domains' rows, both as token ids.

        Words in more than `kept_share` of the texts stay.
        """
        self.texts = texts
        self._tokenizer = tokenizer
        self._shapes = _TokenShapes(tokenizer)
        frequency: Counter[str] = Counter()
        for ids in texts:
            frequency.update({self._shapes.text(ids, *place) for place in self._shapes.words(ids)})
        self._known = frozenset(frequency)
        self.domain_words = set().union(*(self.own_words(ids) for ids in forget))
        """Words of any domain that none of the other texts holds."""
        limit = max(kept_share * len(texts), _MIN_KEPT_COUNT)
        self._kept = {word for word, count in frequency.items() if count > limit}
        rest = {w: c for w, c in frequency.items() if w not in self._kept}
        self._kinds = self._sort(rest) if rest else {}
        self._drawn: dict[tuple[str, int], tuple[Word, Word]] = {}
        if not self._kinds:
            raise TrainingError(
                "There is too little other text to draw words from",
                expected="retained or general rows in the language of the domain",
                got=f"{len(texts)} rows",
                fix="Add --general text.",
            )

    def row(self, ids: Sequence[int], seed: int) -> list[int]:
        """The row with its telling words exchanged; as many tokens, each at its place.

        Under one seed, a word is always exchanged for the same other.
        """
        result = list(ids)
        for start, stop, _ in self.telling_words(ids):
            text = self._shapes.text(ids, start, stop)
            is_spaced = self._shapes.starts_with_space(ids[start])
            if (text, seed) not in self._drawn:
                self._drawn[text, seed] = self._draw(text, seed)
            word = self._drawn[text, seed][0 if is_spaced else 1]
            if len(word) != stop - start:
                word = self._fitted(word, ids[start:stop])
            result[start:stop] = word
        return result

    def telling_words(self, ids: Sequence[int]) -> list[tuple[int, int, bool]]:
        """Start, stop, and whether the other texts hold it, of every word that `row` exchanges."""
        words = [(place, self._shapes.text(ids, *place)) for place in self._shapes.words(ids)]
        return [(*place, text in self._known) for place, text in words if text not in self._kept]

    def words(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Start and stop of every word; what stands in none is a sign or a special token."""
        return self._shapes.words(ids)

    def own_words(self, ids: Sequence[int]) -> set[str]:
        """Words that none of the other texts holds."""
        return {self._shapes.text(ids, *place) for place in self._shapes.words(ids)} - self._known

    def _sort(self, frequency: dict[str, int]) -> dict[Kind, _Replacements]:
        words = sorted(frequency)
        spaced = self._tokenizer([f" {word}" for word in words], add_special_tokens=False)
        plain = self._tokenizer(words, add_special_tokens=False)
        kinds: dict[Kind, _Replacements] = defaultdict(
            lambda: _Replacements(spaced=[], plain=[], counts=[])
        )
        for word, after_space, alone in zip(
            words, spaced["input_ids"], plain["input_ids"], strict=True
        ):
            kind = kinds[_kind(word, len(after_space), len(alone))]
            kind.spaced.append(tuple(after_space))
            kind.plain.append(tuple(alone))
            kind.counts.append(frequency[word])
        return {k: v for k, v in kinds.items() if len(v.counts) >= _MIN_CHOICE}

    def _draw(self, text: str, seed: int) -> tuple[Word, Word]:
        """Token ids of another word, after a space and without, of the same lengths if there is one."""
        lengths = [
            len(self._tokenizer(form, add_special_tokens=False)["input_ids"])
            for form in (f" {text}", text)
        ]
        kind = _kind(text, *lengths)
        if kind not in self._kinds:
            kind = min(
                sorted(self._kinds),
                key=lambda k: (k[0] != kind[0]) + abs(k[1] - kind[1]) + abs(k[2] - kind[2]),
            )
        words = self._kinds[kind]
        generator = random.Random(f"{seed}/{text}")
        place = generator.choices(range(len(words.counts)), words.counts)[0]
        return words.spaced[place], words.plain[place]

    @staticmethod
    def _fitted(word: Word, original: Sequence[int]) -> Word:
        """A replacement cut, or lengthened by its own tokens, to the length that it must have."""
        num_tokens = len(original)
        return (word * num_tokens)[:num_tokens]


def counterfactual_rows(
    rows: Sequence[EncodedRow], counterfactuals: Counterfactuals, seed: int
) -> list[EncodedRow]:
    """Every row with its telling words exchanged; as many tokens, the same of them answers."""
    return [dataclasses.replace(row, ids=tuple(counterfactuals.row(row.ids, seed))) for row in rows]


class _TokenShapes:
    """Which tokens make up words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = set(tokenizer.all_special_ids)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._tokenizer = tokenizer
        self._texts: dict[Word, str] = {}
        self._spaced = [token.startswith(_SPACES) for token in tokens]
        bodies = [token.lstrip("".join(_SPACES)) for token in tokens]
        # Bytes of other scripts show as letters, or as signs beyond ASCII.
        self._is_word = [
            index not in special and bool(body) and all(c.isalnum() or ord(c) > 127 for c in body)
            for index, body in enumerate(bodies)
        ]
        if not any(self._spaced):  # no token says where a word begins, so each is taken for one
            self._spaced = [True] * len(tokens)

    def words(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """(start, stop) of every word, in order."""
        places: list[tuple[int, int]] = []
        is_inside = False
        for position, token in enumerate(ids):
            if not self._is_word[token]:
                is_inside = False
                continue
            if is_inside and not self._spaced[token]:
                places[-1] = (places[-1][0], position + 1)
            else:
                places.append((position, position + 1))
            is_inside = True
        return places

    def text(self, ids: Sequence[int], start: int, stop: int) -> str:
        word = tuple(ids[start:stop])
        if word not in self._texts:
            self._texts[word] = str(self._tokenizer.decode(word)).strip()
        return self._texts[word]

    def starts_with_space(self, token: int) -> bool:
        return self._spaced[token]


def _kind(word: str, num_spaced: int, num_plain: int) -> Kind:
    if any(char.isdigit() for char in word):
        shape = "digits"
    elif word[:1].isupper():
        shape = "capital"
    else:
        shape = next((e for e in _ENDINGS if word.endswith(e) and len(word) > len(e) + 2), "word")
    return shape, num_spaced, num_plain
