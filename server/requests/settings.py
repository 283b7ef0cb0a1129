"""What `alter serve` is told about unlearning requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings

from alter_core.errors import ConfigError
from alter_core.rows import read_rows
from server.flag_values import absolute, split

from .gate import Gate

DEFAULT_MAX_UPLOAD_MIB = 16
_GATE = Gate()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """See the module."""

    workspace: Path | None = None
    """Absolute folder for the text of requests; None: `unlearning` beside the audit log."""
    retain: tuple[Path, ...] = ()
    """Files of what is kept where a request brings none."""
    general: tuple[Path, ...] = ()
    """Files of ordinary text, on which no expert may act."""
    device: str = "auto"
    """Of training: auto, cpu or cuda."""
    signing_key: Path | None = None
    """Private key that signs the experts that requests make."""
    max_upload_mib: int = DEFAULT_MAX_UPLOAD_MIB
    gate: Gate = dataclasses.field(default_factory=Gate)

    @classmethod
    def build(cls, flags: RequestFlags, environment: RequestEnvironment) -> RequestSettings:
        """Fills what no flag gives. Raises: ConfigError, TrainingDataError for files that are no rows."""
        settings = cls(
            workspace=absolute(flags.workspace or environment.workspace),
            retain=_files(flags.retain or tuple(map(Path, split(environment.retain)))),
            general=_files(flags.general or tuple(map(Path, split(environment.general)))),
            device=flags.training_device or environment.training_device,
            signing_key=absolute(flags.signing_key or environment.signing_key),
            max_upload_mib=flags.max_upload_mib or environment.max_upload_mib,
            gate=Gate(
                max_forget_ratio=_given(
                    flags.gate_max_forget_ratio, environment.gate_max_forget_ratio
                ),
                min_utility_ratio=_given(
                    flags.gate_min_utility_ratio, environment.gate_min_utility_ratio
                ),
                max_paraphrase_leak=_given(
                    flags.gate_max_paraphrase_leak, environment.gate_max_paraphrase_leak
                ),
            ),
        )
        if settings.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                "The device of training is unknown",
                expected="auto, cpu or cuda",
                got=repr(settings.device),
                fix="Set --alter-training-device.",
            )
        if settings.max_upload_mib < 1:
            raise ConfigError(
                "The limit of uploads is out of range",
                expected="1 MiB or more",
                got=str(settings.max_upload_mib),
                fix="Set --alter-max-upload-mib.",
            )
        for files in (settings.retain, settings.general):
            if files:
                read_rows(files)
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """Flags of `alter serve`; None and empty are not given."""

    workspace: Path | None = None
    retain: tuple[Path, ...] = ()
    general: tuple[Path, ...] = ()
    training_device: str | None = None
    signing_key: Path | None = None
    max_upload_mib: int | None = None
    gate_max_forget_ratio: float | None = None
    gate_min_utility_ratio: float | None = None
    gate_max_paraphrase_leak: float | None = None


class RequestEnvironment(BaseSettings):
    """The ALTER_* variables of the same names; lists are separated by commas."""

    workspace: Path | None = None
    retain: str = ""
    general: str = ""
    training_device: str = "auto"
    signing_key: Path | None = None
    max_upload_mib: int = Field(default=DEFAULT_MAX_UPLOAD_MIB, ge=1)
    gate_max_forget_ratio: float = _GATE.max_forget_ratio
    gate_min_utility_ratio: float = _GATE.min_utility_ratio
    gate_max_paraphrase_leak: float = _GATE.max_paraphrase_leak


def _given(flag: float | None, environment: float) -> float:
    return environment if flag is None else flag


def _files(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(path.expanduser().absolute() for path in paths)
