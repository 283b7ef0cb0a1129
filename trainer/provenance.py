"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .base_model import BaseModel

_PACKAGES = (
    "alter-server",
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "tokenizers",
    "peft",
)


def versions() -> dict[str, str]:
    """Versions of what training depends on, and the commit."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """The commit of the source this runs from; None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def hardware(base: BaseModel) -> dict[str, Any]:
    """What a run ran on."""
    device = base.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(base.model.dtype).removeprefix("torch."),
    }
