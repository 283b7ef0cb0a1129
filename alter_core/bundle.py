"""Bundle format 1: a folder that holds a substrate or a forget expert, and proves its own content.

    manifest.json         what it is; the SHA-256 of every other file
    weights.safetensors   tensors, nothing executable
    evaluation.json       optional figures
    model.sig             optional OpenSSF model signature (not covered by the manifest)

The digest of a bundle is the SHA-256 of its canonical manifest. Files are hashed and parsed from the same
bytes, so what was verified is what is used. Writing goes to a sibling folder that is renamed at the end: a
half-written folder has another name and no manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from .config import AlterConfig
from .errors import (
    BundleFormatError,
    BundleNotFoundError,
    BundleTamperedError,
    BundleTensorError,
    ConfigError,
)
from .fingerprint import BaseModelInfo

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
EVALUATION = "evaluation.json"
SIGNATURE = "model.sig"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_FILES = 16
MAX_SIDE_FILE_BYTES = 16 * 2**20
"""Of every file that holds no tensors."""
MAX_TENSORS = 65_536
MAX_NAME_LENGTH = 256
MAX_WEIGHTS_HEADER_BYTES = 32 * 2**20
"""Of safetensors' own index, before the tensors."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DOMAIN_NAME_PATTERN = r"^[a-z0-9-]{1,63}$"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
_Size = Annotated[int, Field(ge=0)]


class TensorInfo(_Frozen):
    """Shape and dtype (torch's name, e.g. `bfloat16`) of one tensor."""

    shape: tuple[_Size, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of its values; a dtype that is not supported counts as the widest."""
        sizes = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in DTYPES}
        return math.prod(self.shape) * sizes.get(self.dtype, 8)


class SiteInfo(_Frozen):
    """Size of one adapted input: features in, and stacked features out."""

    in_features: int
    out_features: int


class DataDigest(_Frozen):
    """A training set by digest and size. Never its text."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_rows: int


class Provenance(_Frozen):
    """How the tensors came to be."""

    method: str
    data: dict[str, DataDigest]
    seed: int
    settings: dict[str, float | int | str | bool | None]
    versions: dict[str, str]


class Manifest(_Frozen):
    """`manifest.json` of bundle format 1."""

    format_version: Literal[1] = 1
    kind: Literal["substrate", "forget-expert"]
    name: str = Field(pattern=DOMAIN_NAME_PATTERN)
    base_model: BaseModelInfo
    substrate_digest: str | None = None
    """Digest of the substrate that an expert was trained on; None for a substrate."""
    config: AlterConfig
    sites: dict[_Name, SiteInfo] = Field(max_length=MAX_TENSORS)
    tensors: dict[_Name, TensorInfo] = Field(max_length=MAX_TENSORS)
    files: dict[_Name, str] = Field(max_length=MAX_FILES)
    """SHA-256 of every other file of the bundle, but for the signature."""
    training: Provenance
    created_at: datetime

    @model_validator(mode="after")
    def _check_substrate_digest(self) -> Self:
        if (self.kind == "forget-expert") != (self.substrate_digest is not None):
            raise ValueError(
                "substrate_digest is for a forget-expert, which needs that of a written substrate"
            )
        return self

    def canonical_json(self) -> bytes:
        """The bytes whose SHA-256 is the bundle's digest; also what `manifest.json` holds."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """The bundle's digest, `sha256:` and 64 hexadecimal digits."""
        return "sha256:" + hashlib.sha256(self.canonical_json()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle in memory."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    evaluation: dict[str, Any] | None

    @property
    def digest(self) -> str:
        """See `Manifest.digest`."""
        return self.manifest.digest


def tensor_index(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The manifest's tensor index."""
    return {
        name: TensorInfo(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."))
        for name, t in tensors.items()
    }


def write_bundle(
    folder: Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    evaluation: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes a bundle so that `folder` either holds all of it or does not exist.

    `manifest.files` and `manifest.tensors` are filled in here. Returns the manifest as written.
    Raises: FileExistsError if `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; bundles are immutable, choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    contents = {WEIGHTS: safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})}
    if evaluation is not None:
        contents[EVALUATION] = json.dumps(evaluation, sort_keys=True, indent=1).encode()
    manifest = manifest.model_copy(
        update={
            "tensors": tensor_index(tensors),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        }
    )
    contents[MANIFEST] = manifest.canonical_json()
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        for name, data in contents.items():
            _write_durably(partial / name, data)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Parses the manifest alone.

    Raises: BundleNotFoundError, BundleFormatError.
    """
    path = folder / MANIFEST
    if not folder.is_dir() or path.is_symlink() or not path.is_file():
        raise BundleNotFoundError(
            f"There is no bundle at {folder}",
            expected=f"a folder with {MANIFEST}",
            got="no such folder" if not folder.is_dir() else "a folder without one, or a link",
            fix="Give the folder that `alter train` wrote; an interrupted run leaves none.",
        )
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise BundleFormatError(
            "The manifest is too large",
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            got=f"{size} bytes",
        )
    raw = _parse_object(path, path.read_bytes())
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleFormatError(
            f"{path} has another format",
            expected=f"format_version {FORMAT_VERSION}",
            got=repr(version),
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]
        )
        raise BundleFormatError(
            f"{path} is not a valid manifest",
            expected="bundle format 1",
            got=problems,
            fix=_COPY_AGAIN,
        ) from error
    except ConfigError as error:
        raise BundleFormatError(
            f"{path} holds an impossible configuration", expected="bundle format 1", got=str(error)
        ) from error
    if canonical_json(raw) != manifest.canonical_json():
        # A default filled in here would belong to the digest, and change with the version of ALTER.
        raise BundleFormatError(
            f"{path} leaves fields to defaults or conversion",
            expected="every field of bundle format 1, in its own type",
            got="another reading than its text",
            fix=_COPY_AGAIN,
        )
    return manifest


def read_bundle(folder: Path, kind: Literal["substrate", "forget-expert"]) -> Bundle:
    """Reads and verifies a whole bundle: format, digests, tensor index, finite values.

    Raises: BundleError of the fitting kind; nothing is unpickled or executed.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise BundleFormatError(f"{folder} is of another kind", expected=kind, got=manifest.kind)
    contents = _read_verified(folder, manifest)
    if WEIGHTS not in contents:
        raise BundleTamperedError(
            f"{folder} lists no {WEIGHTS}", expected=WEIGHTS, got="none", fix=_COPY_AGAIN
        )
    try:
        tensors = safetensors.torch.load(contents[WEIGHTS])
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise BundleTensorError(
            f"{folder / WEIGHTS} cannot be read", expected="a safetensors file", got=repr(error)
        ) from error
    _check_tensors(manifest, tensors)
    evaluation = None
    if EVALUATION in contents:
        evaluation = _parse_object(folder / EVALUATION, contents[EVALUATION])
    return Bundle(manifest=manifest, tensors=tensors, evaluation=evaluation)


_COPY_AGAIN = "Copy the bundle again from where it was made."


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _parse_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleFormatError(
            f"{path} is not JSON",
            expected="bundle format 1",
            got="undecodable text",
            fix=_COPY_AGAIN,
        ) from error
    if not isinstance(parsed, dict):
        raise BundleFormatError(
            f"{path} is not a JSON object", expected="bundle format 1", got=type(parsed).__name__
        )
    return parsed


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_verified(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    present = {path.name for path in folder.iterdir()}
    listed = set(manifest.files)
    if stray := present - listed - {MANIFEST, SIGNATURE}:
        raise BundleTamperedError(
            f"{folder} holds files that its manifest does not list",
            expected=_names(listed),
            got=_names(stray),
        )
    if missing := listed - present:
        raise BundleTamperedError(
            f"{folder} lacks files that its manifest lists",
            expected=_names(missing),
            got="none",
            fix=_COPY_AGAIN,
        )
    contents = {}
    for name, expected in manifest.files.items():
        path = folder / name
        if path.name != name or path.is_symlink() or not path.is_file():
            raise BundleTamperedError(
                f"{name!r} is not a plain file of the bundle", expected="a plain file"
            )
        _check_size(path, manifest)
        data = path.read_bytes()
        if (actual := hashlib.sha256(data).hexdigest()) != expected:
            raise BundleTamperedError(
                f"{path} does not match its manifest",
                expected=f"sha256 {expected}",
                got=f"sha256 {actual} over {len(data)} bytes",
                fix=_COPY_AGAIN,
            )
        contents[name] = data
    return contents


def _check_size(path: Path, manifest: Manifest) -> None:
    """Refuses what is larger than what the manifest announces, before it is read into memory."""
    limit = MAX_SIDE_FILE_BYTES
    if path.name == WEIGHTS:
        limit = MAX_WEIGHTS_HEADER_BYTES + sum(t.num_bytes for t in manifest.tensors.values())
    if (size := path.stat().st_size) > limit:
        raise BundleTamperedError(
            f"{path} is larger than its manifest allows",
            expected=f"at most {limit} bytes",
            got=f"{size} bytes",
            fix=_COPY_AGAIN,
        )


def _names(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _check_tensors(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    actual = tensor_index(tensors)
    if actual != manifest.tensors:
        names = {
            n
            for n in actual.keys() | manifest.tensors.keys()
            if actual.get(n) != manifest.tensors.get(n)
        }
        first = min(names)
        raise BundleTensorError(
            f"tensor {first!r} does not match the manifest",
            expected=str(manifest.tensors.get(first, "no such tensor")),
            got=str(actual.get(first, "no such tensor")),
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BundleTensorError(
                f"tensor {name!r} has an unsupported dtype",
                expected=" or ".join(str(dtype) for dtype in DTYPES),
                got=str(tensor.dtype),
            )
        if not bool(torch.isfinite(tensor).all()):
            raise BundleTensorError(
                f"tensor {name!r} holds NaN or infinite values",
                expected="finite values",
                got=f"{int((~torch.isfinite(tensor)).sum())} that are not",
                fix="Train the expert again; do not serve it.",
            )
