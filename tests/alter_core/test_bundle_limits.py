"""What is too large, or does not fit, is refused before it is read into memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from alter_core import ForgetExpert, Substrate, read_bundle, read_manifest
from alter_core.bundle import (
    MAX_FILES,
    MAX_NAME_LENGTH,
    MAX_SIDE_FILE_BYTES,
    MAX_TENSORS,
    MAX_WEIGHTS_HEADER_BYTES,
)
from alter_core.errors import (
    BundleFormatError,
    BundleNotFoundError,
    BundleTamperedError,
    BundleTensorError,
)
from alter_core.substrate import max_expert_bytes
from tests.alter_core.crafted import TRAINING, edit_manifest, small_expert, small_substrate

WEIGHTS, EVALUATION = "weights.safetensors", "evaluation.json"
INFO = {"shape": [1], "dtype": "float32"}


@pytest.fixture
def substrate(tmp_path: Path) -> Substrate:
    return small_substrate().write(tmp_path / "substrate", name="base", training=TRAINING)


@pytest.fixture
def folder(substrate: Substrate, tmp_path: Path) -> Path:
    target = tmp_path / "expert"
    small_expert(substrate).write(target, substrate, training=TRAINING, evaluation={"x": 0.5})
    return target


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read whole."""
    names: list[str] = []
    read_bytes = Path.read_bytes

    def spy(path: Path) -> bytes:
        names.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", spy)
    return names


@pytest.mark.parametrize("name", [WEIGHTS, EVALUATION])
def test_a_file_that_is_larger_than_announced_is_not_read(
    folder: Path, unread: list[str], name: str
) -> None:
    tensors = read_manifest(folder).tensors.values()
    limit = MAX_SIDE_FILE_BYTES
    if name == WEIGHTS:
        limit = MAX_WEIGHTS_HEADER_BYTES + sum(t.num_bytes for t in tensors)
    os.truncate(folder / name, limit + 1)
    with pytest.raises(BundleTamperedError, match="larger than its manifest allows"):
        read_bundle(folder, "forget-expert")
    assert name not in unread
    os.truncate(folder / name, limit)
    with pytest.raises(BundleTamperedError, match="does not match its manifest"):
        read_bundle(folder, "forget-expert")
    assert name in unread


def test_an_expert_that_does_not_fit_is_refused_before_its_tensors_are_read(
    folder: Path, substrate: Substrate, unread: list[str]
) -> None:
    edit_manifest(
        folder,
        lambda raw: raw["tensors"]["layers.2.qkv.lora_b"].update({"shape": [2**40, 2]}),
    )
    with pytest.raises(BundleTensorError, match="wrong shape"):
        ForgetExpert.read(folder, substrate)
    assert WEIGHTS not in unread


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {f"t{i}": INFO for i in range(MAX_TENSORS + 1)}},
        {"tensors": {"n" * (MAX_NAME_LENGTH + 1): INFO}},
        {"tensors": {"t": {"shape": [-1, 5], "dtype": "float32"}}},
        {"files": {f"f{i}": "a" * 64 for i in range(MAX_FILES + 1)}},
        {"files": {"n" * (MAX_NAME_LENGTH + 1): "a" * 64}},
        {"sites": {"n" * (MAX_NAME_LENGTH + 1): {"in_features": 1, "out_features": 1}}},
    ],
    ids=["tensors", "tensor-name", "negative", "files", "file-name", "site-name"],
)
def test_numbers_and_names_in_a_manifest_are_bounded(folder: Path, change: dict[str, Any]) -> None:
    edit_manifest(folder, lambda raw: raw.update(change))
    with pytest.raises(BundleFormatError) as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 2000


def test_a_manifest_that_is_a_link_is_no_manifest(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"format_version": 1, "password": "x"}))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(secret)
    with pytest.raises(BundleNotFoundError) as caught:
        read_manifest(folder)
    assert "password" not in str(caught.value)


def test_an_expert_fits_into_the_limit_of_its_substrate(folder: Path, substrate: Substrate) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    limit = max_expert_bytes(substrate)
    assert size < limit
    numbers = sum(t.numel() for t in read_bundle(folder, "forget-expert").tensors.values())
    assert limit > numbers * 4
    assert limit < numbers * 4 + 2**27
