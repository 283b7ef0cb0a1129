"""Everything that a model's blocks serve, made where it is missing and kept under `build/serving`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from alter_cli.demo.artefacts import package_folder, sources
from alter_cli.demo.base_model import LlamaShape
from alter_core import AlterConfig, Substrate
from trainer.base_model import BaseModel, load_base_model
from trainer.substrate import normalised_embeddings

from . import experts
from .floor import rank_of_bundle, seven_billion
from .models import SHAPES, Sizes, prose_ids, save_model
from .names import NUM_DOMAINS, TokenIds, domain_names
from .settings import RANK

_SOURCES = "artefacts,experts,models,names,floor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A substrate, and the experts that were made for it."""

    substrate: Path
    experts: tuple[Path, ...]
    """Bundles of domains 0, 1, ..."""


class Artefacts:
    """A model and what is attached to it."""

    def __init__(self, folder: Path, shape: LlamaShape, *, seed: int) -> None:
        """`folder` is this model's own."""
        self.folder = folder
        self.model = folder / "model"
        self.shape = shape
        self.seed = seed
        _once(self.model, lambda path: save_model(path, shape, seed=seed))

    @classmethod
    def of(cls, root: Path, name: str, *, seed: int) -> Artefacts:
        """Of a shape's name, in a folder that is named after what it is made from."""
        key = json.dumps([dataclasses.asdict(SHAPES[name]), seed])
        here = package_folder("benchmarks.serving")
        digest = hashlib.sha256(
            "\0".join(
                [key, sources(here, _SOURCES), sources(package_folder("alter_core"))]
            ).encode()
        )
        return cls(root / f"{name}-{digest.hexdigest()[:12]}", SHAPES[name], seed=seed)

    @property
    def config(self) -> AlterConfig:
        """The configuration that the experts are served with."""
        return experts.serving_config(self.shape.num_layers)

    @functools.cached_property
    def base(self) -> BaseModel:
        """The model in memory."""
        return load_base_model(self.model, device="cpu")

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""
        return PreTrainedTokenizerFast.from_pretrained(self.model)

    @functools.cached_property
    def prose(self) -> TokenIds:
        """Text that sets off no expert."""
        return prose_ids(self.tokenizer)

    @functools.cached_property
    def names(self) -> list[list[TokenIds]]:
        """Names by domain."""
        return domain_names(
            self.tokenizer,
            names_per_domain=self.config.evidence_units,
            ngram=self.config.evidence_ngram,
            seed=self.seed,
        )

    def family(self, num_domains: int, rank: int = RANK) -> Family:
        """The substrate of a rank, with that many experts."""
        assert num_domains <= NUM_DOMAINS
        folder = self.folder / f"rank-{rank}"
        config = experts.serving_config(self.shape.num_layers, rank)
        _once(
            folder / "substrate",
            lambda path: experts.make_substrate(
                self.base, config, self.prose, path, seed=self.seed
            ),
        )
        bundles = tuple(folder / f"domain-{domain:03}" for domain in range(num_domains))
        if not all(bundle.exists() for bundle in bundles):
            self._make_experts(folder / "substrate", bundles)
        return Family(substrate=folder / "substrate", experts=bundles)

    def heavy_family(self, num_domains: int) -> Family:
        """The same with a rank at which a bundle weighs what a 7B's of rank 8 weighs."""
        return self.family(num_domains, rank_of_bundle(seven_billion(), Sizes.of(self.shape)))

    def adapter(self) -> Path:
        """An adapter of the experts' rank for vLLM's own LoRA."""
        return _once(
            self.folder / "adapter",
            lambda path: experts.make_adapter(self.model, self.config, path, seed=self.seed),
        )

    def _make_experts(self, substrate_folder: Path, bundles: tuple[Path, ...]) -> None:
        substrate = Substrate.read(substrate_folder, self.base.info)
        with torch.no_grad():
            embeddings = normalised_embeddings(self.base, substrate)
        for domain, bundle in enumerate(bundles):
            if not bundle.exists():
                experts.make_expert(
                    substrate,
                    embeddings,
                    bundle.name,
                    self.names[domain],
                    bundle,
                    seed=self.seed + 1 + domain,
                )


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """Calls `make` with a folder that becomes `path` at the end, unless that is there already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
            partial = Path(scratch) / path.name
            make(partial)
            partial.rename(path)
    return path
