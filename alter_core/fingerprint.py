"""Identity of a base model: a digest over its configuration and samples of every tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from .errors import UnsupportedModelError
from .sites import check_architecture

_VOLATILE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_SAMPLE_ROWS = 16
_SAMPLE_ELEMENTS = 32
"""Of each sampled row."""


class BaseModelInfo(BaseModel):
    """Which base model a bundle belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Folder or hub name at training time; informative only."""
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    fingerprint: str
    """SHA-256 over the configuration, every tensor's name, shape and dtype, and samples of its values."""

    @classmethod
    def from_folder(cls, folder: Path) -> BaseModelInfo:
        """Reads a model folder in transformers layout with safetensors weights.

        Raises: UnsupportedModelError if there is no config, no safetensors, or an unsupported architecture.
        """
        config = _read_config(folder)
        architecture = (config.get("architectures") or ["(none)"])[0]
        check_architecture(architecture)
        sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
        if missing := [key for key in sizes if key not in config]:
            raise UnsupportedModelError(
                f"{folder / 'config.json'} does not tell the model's size",
                expected=", ".join(sizes),
                got=f"none of {', '.join(missing)}",
            )
        return cls(
            name=folder.name,
            architecture=architecture,
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            fingerprint=_fingerprint(folder, config),
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            "The base model cannot be read",
            expected=f"a transformers model folder with config.json at {folder}",
            got=type(error).__name__,
            fix="Give a local folder; download a hub model first.",
        ) from error
    return config


def _fingerprint(folder: Path, config: dict[str, Any]) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModelError(
            "The base model has no safetensors weights",
            expected=f"*.safetensors in {folder}",
            got="none",
            fix="Save it again with save_pretrained(safe_serialization=True).",
        )
    stable = {k: v for k, v in config.items() if k not in _VOLATILE_KEYS}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    tensors: dict[str, bytes] = {}
    for file in files:
        tensors |= _samples(file)
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    return digest.hexdigest()


def _samples(file: Path) -> dict[str, bytes]:
    try:
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            return {name: _sample(handle.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"{file} is not a readable safetensors file",
            expected="safetensors weights",
            got=str(error),
            fix="Copy or download the base model again.",
        ) from error


def _sample(tensor_slice: Any) -> bytes:
    """Shape, dtype, and elements of rows spread over a tensor, without reading all of it."""
    shape = list(tensor_slice.get_shape())
    header = f"{shape}{tensor_slice.get_dtype()}".encode()
    if 0 in shape or not shape:
        return header
    rows = sorted({round(i * (shape[0] - 1) / (_SAMPLE_ROWS - 1)) for i in range(_SAMPLE_ROWS)})
    values = [
        tensor_slice[row : row + 1].flatten()[:_SAMPLE_ELEMENTS].contiguous().view(torch.uint8)
        for row in rows
    ]
    return header + b"".join(value.numpy().tobytes() for value in values)
