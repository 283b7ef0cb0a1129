from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alter_core.errors import TrainingError
from trainer.checkpoint import Checkpoint, adam_tensors, restore, restore_adam, write_atomically


def _stepped(weight: torch.Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        weight.grad = torch.full_like(weight, 0.3 + step)
        optimizer.step()


def test_optimiser_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = torch.ones(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([whole], lr=0.1)
    _stepped(whole, optimizer, range(3))
    state = {"w": whole.detach().clone(), **adam_tensors(optimizer, {"w": whole})}
    Checkpoint(step=3, tensors=state).write(tmp_path / "c.safetensors", "key")
    _stepped(whole, optimizer, range(3, 6))

    stored = Checkpoint.read(tmp_path / "c.safetensors", "key")
    assert stored is not None
    resumed = torch.zeros(2, 3, requires_grad=True)
    again = torch.optim.Adam([resumed], lr=0.1)
    restore({"w": resumed}, stored.tensors)
    restore_adam(again, {"w": resumed}, stored.tensors)
    _stepped(resumed, again, range(stored.step, 6))
    assert torch.equal(whole, resumed)


def test_checkpoint_of_another_run_and_a_torn_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert Checkpoint.read(path, "key") is None
    Checkpoint(step=1, tensors={"w": torch.ones(2)}).write(path, "key")
    with pytest.raises(TrainingError, match="another run"):
        Checkpoint.read(path, "other")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(TrainingError, match="cannot be used"):
        Checkpoint.read(path, "key")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
