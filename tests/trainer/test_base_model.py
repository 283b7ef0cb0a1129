from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.base_model import load_base_model

from .world import make_model, make_tokenizer


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_bfloat16_is_not_computed_where_it_is_emulated_and_bundles_keep_it(
    fast: torch.dtype, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(len(tokenizer)).to(stored).save_pretrained(tmp_path)
    monkeypatch.setattr("trainer.base_model.fast_dtype", lambda: fast)
    base = load_base_model(tmp_path, device="cpu")
    assert base.dtype == stored
    assert base.model.dtype == (torch.float32 if torch.float32 in (fast, stored) else stored)
