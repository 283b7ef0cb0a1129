"""Checkpoints of a stage: tensors and the run they belong to, in one safetensors file.

Nothing is pickled. A checkpoint is replaced atomically, so the last good one survives anything.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from alter_core.errors import TrainingError

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that its name holds either the old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a stage stood after `step` steps."""

    step: int
    tensors: dict[str, Tensor]

    def write(self, path: Path, run: str) -> None:
        """Writes or replaces the file; `run` is the key of the run it belongs to."""
        data = safetensors.torch.save(
            {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()},
            metadata={"run": run, "step": str(self.step)},
        )
        write_atomically(path, data)

    @classmethod
    def read(cls, path: Path, run: str) -> Checkpoint | None:
        """None where there is none.

        Raises: TrainingError if it is torn or belongs to a run with other settings or data.
        """
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(metadata["step"])
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint {path} cannot be used",
                expected="a checkpoint of this run",
                got=type(error).__name__,
                fix="Delete it to train this part from its start.",
            ) from error
        if metadata.get("run") != run:
            raise TrainingError(
                f"The checkpoint {path} belongs to another run",
                expected="the same data, settings and seed",
                got="others",
                fix="Repeat the first command with --resume, or choose another --out.",
            )
        return cls(step=step, tensors=tensors)


def adam_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The optimiser's state by parameter name."""
    return {
        f"adam.{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        for key in _ADAM_STATE
        if parameter in optimizer.state
    }


def restore_adam(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Puts back what `adam_tensors` took."""
    for name, parameter in parameters.items():
        state = {key: tensors.get(f"adam.{name}.{key}") for key in _ADAM_STATE}
        if all(value is not None for value in state.values()):
            optimizer.state[parameter] = {
                key: value.cpu() if key == "step" else value.to(parameter.device)
                for key, value in state.items()
                if value is not None
            }


def restore(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies stored values into parameters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
