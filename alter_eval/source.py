"""What is evaluated: a model's folder, with experts attached in this process, or a running server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alter_core.attach import AttachedModel
from alter_core.errors import ConfigError
from alter_core.substrate import ForgetExpert, Substrate
from trainer.base_model import BaseModel, load_base_model
from trainer.cli import named_paths
from trainer.evaluation import attached_experts
from trainer.substrate import on_device

from .models import API_KEY_VARIABLE, LanguageModel, ServedModel, TransformersModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The options that every benchmark has. Raises: ConfigError if they contradict each other."""

    model: Path
    """Folder of the base model; of a server's, for its tokenizer."""
    device: str = "auto"
    substrate: Path | None = None
    domains: Sequence[str] = ()
    """Experts to attach, NAME=DIR."""
    server: str | None = None
    """A server's root, without `/v1`."""
    served_model: str = "demo"

    def __post_init__(self) -> None:
        if self.server is not None and (self.substrate is not None or self.domains):
            raise ConfigError(
                "A server has its own experts",
                expected="neither --substrate nor --domain beside --server",
                got="one of them",
                fix="Activate the domains on the server.",
            )
        if self.domains and self.substrate is None:
            raise ConfigError(
                "Experts need their substrate",
                expected="--substrate",
                got="--domain alone",
                fix="Name the substrate that they were trained on.",
            )

    @property
    def api_key(self) -> str | None:
        """The server's, from the environment."""
        return os.environ.get(API_KEY_VARIABLE) or None

    @contextlib.contextmanager
    def open(self) -> Iterator[Evaluated]:
        """Loads what is to be asked; hooks and connections are gone when the block ends."""
        base = load_base_model(self.model, device=self.device)
        what: dict[str, Any] = {"model": base.info.fingerprint, "experts": {}}
        if self.server is not None:
            what["server"] = self.served_model
            served = ServedModel(
                self.server, self.served_model, base.tokenizer, api_key=self.api_key
            )
            with contextlib.closing(served):
                yield Evaluated(source=self, base=base, model=served, what=what)
            return
        if self.substrate is None:
            yield Evaluated(source=self, base=base, model=TransformersModel(base), what=what)
            return
        shared = on_device(Substrate.read(self.substrate, base.info), base.device)
        folders = named_paths("--domain", list(self.domains))
        experts = [ForgetExpert.read(folder, shared) for folder in folders.values()]
        what["substrate"] = shared.digest
        what["experts"] = {name: e.digest for name, e in zip(folders, experts, strict=True)}
        with attached_experts(base, shared, experts) as attached:
            yield Evaluated(
                source=self,
                base=base,
                model=TransformersModel(base),
                attached=attached,
                what=what,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A source that is open."""

    source: Source
    base: BaseModel
    """The base model in this process; of a server, what its tokenizer belongs to."""
    model: LanguageModel
    attached: AttachedModel | None = None
    what: dict[str, Any]
    """What it is, for `run.json`: fingerprints and digests."""
