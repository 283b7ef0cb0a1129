"""What all forget domains share, and what belongs to one: the two kinds of artefact.

Legend: R rank, I input features, O stacked output features, D embedding size.
"""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bundle import (
    MAX_MANIFEST_BYTES,
    MAX_SIDE_FILE_BYTES,
    MAX_WEIGHTS_HEADER_BYTES,
    Bundle,
    Manifest,
    Provenance,
    SiteInfo,
    TensorInfo,
    read_bundle,
    read_manifest,
    write_bundle,
)
from .config import AlterConfig
from .entropy import EntropyEstimator
from .errors import BaseModelMismatchError, BundleTensorError, SubstrateMismatchError
from .evidence import EvidenceHead
from .fingerprint import BaseModelInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Substrate:
    """Everything that experts of one base model share, frozen once they exist.

    `lora_a[site]` (R, I); `retain_lora_b[site]` (O, R), empty in `identity` mode;
    `embedding_mean`, `embedding_std` (D,) normalise what evidence heads read.
    """

    base_model: BaseModelInfo
    config: AlterConfig
    sites: dict[str, SiteInfo]
    lora_a: dict[str, Tensor]
    retain_lora_b: dict[str, Tensor]
    estimator: EntropyEstimator
    embedding_mean: Tensor
    embedding_std: Tensor
    digest: str | None = None
    """None until it was written."""

    def normalise(self, embeddings: Tensor) -> Tensor:
        """Input embeddings as evidence heads read them. Shapes: (..., D) -> (..., D), float32."""
        mean, std = (
            self.embedding_mean.to(embeddings.device),
            self.embedding_std.to(embeddings.device),
        )
        return (embeddings.float() - mean) / std

    def write(
        self,
        folder: Path,
        *,
        name: str,
        training: Provenance,
        evaluation: dict[str, Any] | None = None,
    ) -> Substrate:
        """Writes the substrate as a bundle; returns it with its digest."""
        tensors = {f"{site}.lora_a": t for site, t in self.lora_a.items()}
        tensors |= {f"{site}.retain.lora_b": t for site, t in self.retain_lora_b.items()}
        tensors |= _module_tensors("entropy_estimator", self.estimator)
        tensors |= {
            "router.embedding_mean": self.embedding_mean,
            "router.embedding_std": self.embedding_std,
        }
        manifest = Manifest(
            kind="substrate",
            name=name,
            base_model=self.base_model,
            config=self.config,
            sites=self.sites,
            tensors={},
            files={},
            training=training,
            created_at=datetime.now(UTC),
        )
        written = write_bundle(folder, manifest, tensors, evaluation)
        return dataclasses.replace(self, digest=written.digest)

    @classmethod
    def read(cls, folder: Path, base_model: BaseModelInfo | None = None) -> Substrate:
        """Reads and verifies a substrate; with `base_model`, also that it was made for that model.

        Raises: BundleError of the fitting kind.
        """
        bundle = read_bundle(folder, "substrate")
        manifest = bundle.manifest
        _check_base_model(manifest, base_model)
        config, size = manifest.config, manifest.base_model.hidden_size
        estimator = EntropyEstimator(size)
        expected: dict[str, tuple[int, ...]] = {
            f"{s}.lora_a": (config.rank, i.in_features) for s, i in manifest.sites.items()
        }
        if config.retain_expert == "trained":
            expected |= {
                f"{s}.retain.lora_b": (i.out_features, config.rank)
                for s, i in manifest.sites.items()
            }
        expected |= {
            k: tuple(t.shape) for k, t in _module_tensors("entropy_estimator", estimator).items()
        }
        expected |= {"router.embedding_mean": (size,), "router.embedding_std": (size,)}
        _check_shapes(manifest, expected)
        _load_module("entropy_estimator", estimator, bundle.tensors)
        return cls(
            base_model=manifest.base_model,
            config=config,
            sites=manifest.sites,
            lora_a={s: bundle.tensors[f"{s}.lora_a"] for s in manifest.sites},
            retain_lora_b={
                s: bundle.tensors[f"{s}.retain.lora_b"]
                for s in manifest.sites
                if config.retain_expert == "trained"
            },
            estimator=estimator,
            embedding_mean=bundle.tensors["router.embedding_mean"],
            embedding_std=bundle.tensors["router.embedding_std"],
            digest=bundle.digest,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetExpert:
    """One forget domain: its B at every site and its evidence head.

    `lora_b[site]` (O, R). `scalar_weight` is the domain's entry of W_g for the literal router.
    """

    name: str
    lora_b: dict[str, Tensor]
    evidence: EvidenceHead
    scalar_weight: float = 0.0
    digest: str | None = None
    evaluation: dict[str, Any] | None = None

    def write(
        self,
        folder: Path,
        substrate: Substrate,
        *,
        training: Provenance,
        evaluation: dict[str, Any] | None = None,
    ) -> ForgetExpert:
        """Writes the expert as a bundle that names its substrate; returns it with its digest."""
        tensors = {f"{site}.lora_b": t for site, t in self.lora_b.items()}
        tensors |= _module_tensors("evidence", self.evidence)
        tensors["router.scalar_weight"] = torch.tensor([self.scalar_weight])
        manifest = Manifest(
            kind="forget-expert",
            name=self.name,
            base_model=substrate.base_model,
            substrate_digest=substrate.digest,
            config=substrate.config,
            sites=substrate.sites,
            tensors={},
            files={},
            training=training,
            created_at=datetime.now(UTC),
        )
        written = write_bundle(folder, manifest, tensors, evaluation)
        return dataclasses.replace(self, digest=written.digest, evaluation=evaluation)

    @classmethod
    def read(cls, folder: Path, substrate: Substrate) -> ForgetExpert:
        """Reads and verifies an expert against the substrate it is to be used with.

        Raises: BundleError of the fitting kind.
        """
        # Before any tensor is read: what does not fit may be of any size.
        _check_expert(read_manifest(folder), substrate)
        return cls.from_bundle(read_bundle(folder, "forget-expert"), substrate)

    @classmethod
    def from_bundle(cls, bundle: Bundle, substrate: Substrate) -> ForgetExpert:
        """See `read`."""
        manifest = bundle.manifest
        _check_expert(manifest, substrate)
        head = _evidence_head(substrate)
        _load_module("evidence", head, bundle.tensors)
        return cls(
            name=manifest.name,
            lora_b={s: bundle.tensors[f"{s}.lora_b"] for s in substrate.sites},
            evidence=head,
            scalar_weight=float(bundle.tensors["router.scalar_weight"]),
            digest=bundle.digest,
            evaluation=bundle.evaluation,
        )


def max_expert_bytes(substrate: Substrate) -> int:
    """What the files of an expert of this substrate can come to, in its widest dtype."""
    numbers = sum(math.prod(shape) for shape in _expert_shapes(substrate).values())
    side_files = MAX_MANIFEST_BYTES + MAX_SIDE_FILE_BYTES
    return numbers * torch.float32.itemsize + MAX_WEIGHTS_HEADER_BYTES + side_files


def _evidence_head(substrate: Substrate) -> EvidenceHead:
    config = substrate.config
    return EvidenceHead(
        substrate.base_model.hidden_size,
        ngram=config.evidence_ngram,
        num_units=config.evidence_units,
    )


def _expert_shapes(substrate: Substrate) -> dict[str, tuple[int, ...]]:
    rank = substrate.config.rank
    shapes: dict[str, tuple[int, ...]] = {
        f"{s}.lora_b": (i.out_features, rank) for s, i in substrate.sites.items()
    }
    with torch.device("meta"):
        head = _module_tensors("evidence", _evidence_head(substrate))
    return shapes | {k: tuple(t.shape) for k, t in head.items()} | {"router.scalar_weight": (1,)}


def _check_expert(manifest: Manifest, substrate: Substrate) -> None:
    if manifest.kind != "forget-expert":
        return  # read_bundle says so
    _check_base_model(manifest, substrate.base_model)
    if manifest.substrate_digest != substrate.digest:
        raise SubstrateMismatchError(
            f"expert {manifest.name!r} was trained on another substrate",
            expected=str(substrate.digest),
            got=str(manifest.substrate_digest),
            fix="Train it with `alter train --substrate` on the substrate that is served.",
        )
    _check_shapes(manifest, _expert_shapes(substrate))


def _module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": t.detach() for name, t in module.state_dict().items()}


def _load_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict({n: tensors[f"{prefix}.{n}"] for n in module.state_dict()})
    module.requires_grad_(False)


def _check_base_model(manifest: Manifest, base_model: BaseModelInfo | None) -> None:
    if base_model is not None and manifest.base_model.fingerprint != base_model.fingerprint:
        raise BaseModelMismatchError(
            f"{manifest.kind} {manifest.name!r} was made for another base model",
            expected=f"{base_model.name} ({base_model.fingerprint[:16]})",
            got=f"{manifest.base_model.name} ({manifest.base_model.fingerprint[:16]})",
            fix="Serve the base model it was trained on, or train it again on this one.",
        )


def _check_shapes(manifest: Manifest, expected: dict[str, tuple[int, ...]]) -> None:
    actual: dict[str, TensorInfo] = manifest.tensors
    for name in sorted(expected.keys() | actual.keys()):
        wanted, info = expected.get(name), actual.get(name)
        if info is None or wanted != info.shape:
            raise BundleTensorError(
                f"tensor {name!r} has the wrong shape for its configuration",
                expected="no such tensor" if wanted is None else str(wanted),
                got="no such tensor" if info is None else str(info.shape),
            )
