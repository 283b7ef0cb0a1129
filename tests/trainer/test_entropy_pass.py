from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alter_core.entropy import tsallis_entropy
from alter_core.rows import read_rows
from trainer import entropy_pass
from trainer.base_model import BaseModel
from trainer.dataset import encode_rows
from trainer.entropy_pass import cached_entropy, run_entropy_pass

from .world import World

Q = 1.3


def test_entropy_belongs_to_the_token_read_whatever_the_batch(
    world: World, base: BaseModel
) -> None:
    rows = encode_rows(read_rows([world.files["general"]]), base.tokenizer, max_tokens=64)
    passed = run_entropy_pass(base, rows, tsallis_q=Q, tap_layer=1)
    start = 0
    for row, entropy in zip(rows, passed.entropy, strict=True):
        with torch.no_grad():
            output = base.model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        expected = tsallis_entropy(output.logits[0], Q)
        torch.testing.assert_close(entropy, expected, atol=0.02, rtol=0.02)
        hidden = passed.hidden_states[start : start + len(row.ids)]
        torch.testing.assert_close(hidden, output.hidden_states[1][0], atol=0.02, rtol=0.02)
        start += len(row.ids)


def test_second_run_reads_the_cache_and_a_torn_one_is_made_again(
    world: World, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encode_rows(read_rows([world.files["red"]]), base.tokenizer, max_tokens=64)
    runs = []
    real = entropy_pass.run_entropy_pass
    monkeypatch.setattr(
        entropy_pass, "run_entropy_pass", lambda *a, **k: runs.append(1) or real(*a, **k)
    )

    def entropy(q: float) -> list[torch.Tensor]:
        return cached_entropy(base, rows, tsallis_q=q, tap_layer=1, folder=tmp_path)

    first, second = entropy(Q), entropy(Q)
    assert len(runs) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [len(values) for values in first] == [len(row.ids) for row in rows]
    entropy(1.5)
    assert len(runs) == 2, "another q is another entry"
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    third = entropy(Q)
    assert len(runs) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
