"""A bundle is read whole and as it was written, or it is refused with a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core import (
    AlterConfig,
    DataDigest,
    ForgetExpert,
    Manifest,
    Provenance,
    Substrate,
    bundle,
    read_bundle,
    read_manifest,
)
from alter_core.bundle import MAX_MANIFEST_BYTES, write_bundle
from alter_core.errors import (
    BaseModelMismatchError,
    BundleError,
    BundleFormatError,
    BundleNotFoundError,
    BundleTamperedError,
    BundleTensorError,
    SubstrateMismatchError,
)
from tests.alter_core.crafted import (
    BASE_MODEL,
    CREATED_AT,
    SITES,
    TRAINING,
    edit_manifest,
    replace_file,
    small_expert,
    small_substrate,
)

MANIFEST, WEIGHTS, EVALUATION = "manifest.json", "weights.safetensors", "evaluation.json"
FIGURES = {"forget_probability": 0.25}

json_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)


@pytest.fixture
def substrate(tmp_path: Path) -> Substrate:
    """Written to `tmp_path / "substrate"`."""
    return small_substrate().write(tmp_path / "substrate", name="base", training=TRAINING)


@pytest.fixture
def folder(substrate: Substrate, tmp_path: Path) -> Path:
    """An undamaged forget expert with an evaluation."""
    target = tmp_path / "expert"
    small_expert(substrate).write(target, substrate, training=TRAINING, evaluation=FIGURES)
    return target


def make_manifest(**fields: Any) -> Manifest:
    settings: dict[str, Any] = {
        "kind": "substrate",
        "name": "base",
        "base_model": BASE_MODEL,
        "config": small_substrate().config,
        "sites": SITES,
        "tensors": {},
        "files": {},
        "training": TRAINING,
        "created_at": CREATED_AT,
    }
    return Manifest(**(settings | fields))


def replace_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, reindex: bool
) -> None:
    """Forges weights with a fitting digest; `reindex` forges the tensor index as well."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(tensors)
    replace_file(folder, WEIGHTS, safetensors.torch.save(tensors))
    if reindex:
        index = {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        }
        edit_manifest(folder, lambda raw: raw.update(tensors=index))


def raw_safetensors(header: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(
    error: type[BundleError], folder: Path, *, expected: str | None, got: str | None
) -> BundleError:
    """Reading the expert fails with exactly this class, and the message gives both sides."""
    with pytest.raises(BundleError) as caught:
        read_bundle(folder, "forget-expert")
    assert type(caught.value) is error
    for part, wanted in ((caught.value.expected, expected), (caught.value.got, got)):
        assert part == wanted or (part is not None and wanted is not None and wanted in part)
    return caught.value


# Round trip.


def test_a_substrate_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for mode in ("identity", "trained"):
        original = small_substrate(retain_expert=mode)
        written = original.write(tmp_path / mode, name="base", training=TRAINING)
        read = Substrate.read(tmp_path / mode, BASE_MODEL)
        assert read.digest == written.digest
        assert (read.base_model, read.config, read.sites) == (BASE_MODEL, original.config, SITES)
        for field in ("lora_a", "retain_lora_b"):
            before, after = getattr(original, field), getattr(read, field)
            assert before.keys() == after.keys()
            for site in before:
                assert after[site].dtype is torch.bfloat16
                assert torch.equal(before[site], after[site])
        assert torch.equal(read.embedding_mean, original.embedding_mean)
        assert torch.equal(read.embedding_std, original.embedding_std)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(read.estimator(x), original.estimator(x))
        assert not any(p.requires_grad for p in read.estimator.parameters())


def test_an_expert_comes_back_as_it_was_written(substrate: Substrate, tmp_path: Path) -> None:
    original = small_expert(substrate, "some-person")
    written = original.write(tmp_path / "x", substrate, training=TRAINING, evaluation=FIGURES)
    read = ForgetExpert.read(tmp_path / "x", substrate)
    assert (read.name, read.digest, read.evaluation) == ("some-person", written.digest, FIGURES)
    assert read.scalar_weight == 0.75
    assert read.lora_b.keys() == original.lora_b.keys()
    assert all(torch.equal(read.lora_b[site], b) for site, b in original.lora_b.items())
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.evidence(x), original.evidence(x))


def test_an_evaluation_is_optional(substrate: Substrate, tmp_path: Path) -> None:
    small_expert(substrate).write(tmp_path / "x", substrate, training=TRAINING)
    assert sorted(os.listdir(tmp_path / "x")) == [MANIFEST, WEIGHTS]
    assert ForgetExpert.read(tmp_path / "x", substrate).evaluation is None


def test_a_signature_beside_the_files_is_no_stranger(folder: Path) -> None:
    digest = read_bundle(folder, "forget-expert").digest
    (folder / "model.sig").write_bytes(b"signature")
    assert read_bundle(folder, "forget-expert").digest == digest


@given(
    st.dictionaries(st.text(max_size=8), json_scalars, max_size=4),
    st.datetimes(timezones=st.just(UTC)),
    st.floats(0.1, 100),
)
def test_any_manifest_survives_its_canonical_form(
    settings: dict[str, Any], created_at: datetime, lora_alpha: float
) -> None:
    training = Provenance(method="m", data={}, seed=0, settings=settings, versions={})
    config = AlterConfig(tap_layer=0, lora_alpha=lora_alpha, target_modules=("o", "qkv"))
    manifest = make_manifest(training=training, created_at=created_at, config=config)
    again = Manifest.model_validate(json.loads(manifest.canonical_json()))
    assert again == manifest
    assert again.digest == manifest.digest
    for name, value in settings.items():
        assert type(again.training.settings[name]) is type(value)


def test_whole_numbers_given_for_fractions_do_not_change_the_digest(tmp_path: Path) -> None:
    whole: Any = {"lora_alpha": 16, "tsallis_q": 1.5, "temperature_high": 1}
    written = small_substrate(**whole).write(tmp_path / "x", name="base", training=TRAINING)
    assert Substrate.read(tmp_path / "x").digest == written.digest


def test_non_contiguous_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(15.0).reshape(3, 5).T
    write_bundle(tmp_path / "x", make_manifest(), {"a": tensor})
    assert torch.equal(read_bundle(tmp_path / "x", "substrate").tensors["a"], tensor)


# The digest.


def test_the_digest_is_sha256_over_the_manifest_file(folder: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    expected = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert read_manifest(folder).digest == expected
    assert read_bundle(folder, "forget-expert").digest == expected


def test_the_digest_does_not_depend_on_how_the_manifest_is_laid_out(folder: Path) -> None:
    before = read_bundle(folder, "forget-expert").digest
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(dict(reversed(raw.items())), indent=3))
    assert read_bundle(folder, "forget-expert").digest == before


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"created_at": datetime(2027, 1, 1, tzinfo=UTC)},
        {"files": {"weights.safetensors": "b" * 64}},
        {"config": AlterConfig(tap_layer=1)},
        {"training": TRAINING.model_copy(update={"seed": 4})},
        {"kind": "forget-expert", "substrate_digest": "sha256:" + "c" * 64},
    ],
)
def test_every_part_of_the_manifest_is_in_the_digest(change: dict[str, Any]) -> None:
    assert make_manifest(**change).digest != make_manifest().digest


# Writing.


def test_an_existing_folder_is_never_written_to(
    folder: Path, substrate: Substrate, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    empty = tmp_path / "empty"
    empty.mkdir()
    for target in (folder, empty, folder / MANIFEST):
        with pytest.raises(FileExistsError, match="immutable"):
            small_expert(substrate, "other").write(target, substrate, training=TRAINING)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(empty.iterdir())


def test_a_bundle_can_be_read_by_another_user(folder: Path) -> None:
    """The server does not run as the one who trained."""
    assert folder.stat().st_mode & 0o777 == 0o755


def test_missing_parent_folders_are_made(tmp_path: Path) -> None:
    small_substrate().write(tmp_path / "a" / "b" / "c", name="base", training=TRAINING)
    Substrate.read(tmp_path / "a" / "b" / "c")


@pytest.fixture(params=[OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def interruption(request: pytest.FixtureRequest) -> BaseException:
    """What may end a write half-way."""
    result: BaseException = request.param
    return result


@pytest.fixture(params=[1, 2, 3])
def fail_at(
    request: pytest.FixtureRequest, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """The n-th file cannot be brought to disk."""
    calls = []

    def fsync(_: int) -> None:
        calls.append(1)
        if len(calls) == request.param:
            raise interruption

    monkeypatch.setattr(bundle.os, "fsync", fsync)
    yield request.param
    assert len(calls) == request.param


def test_an_interrupted_write_leaves_nothing(
    interruption: BaseException, fail_at: int, tmp_path: Path
) -> None:
    target = tmp_path / "folder" / "x"
    with pytest.raises(type(interruption)):
        write_bundle(target, make_manifest(), {"a": torch.zeros(3)}, FIGURES)
    assert not list((tmp_path / "folder").iterdir())


def test_a_process_killed_while_writing_leaves_nothing_that_reads_as_a_bundle(
    interruption: BaseException,
    fail_at: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A killed process cannot clean up, so here nobody does."""
    monkeypatch.setattr(bundle.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(type(interruption)):
        write_bundle(tmp_path / "x", make_manifest(), {"a": torch.zeros(3)}, FIGURES)
    assert not (tmp_path / "x").exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".x.partial-")
    if fail_at < 3:
        assert not (leftover / MANIFEST).exists()
    monkeypatch.undo()
    manifest = write_bundle(tmp_path / "x", make_manifest(), {"a": torch.zeros(3)}, FIGURES)
    assert read_bundle(tmp_path / "x", "substrate").digest == manifest.digest


def test_a_half_copied_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """Copied file by file in any order: only all of them make a bundle."""
    names = sorted(os.listdir(folder))
    for missing in names:
        part = tmp_path / f"without-{missing}"
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns(missing))
        with pytest.raises((BundleNotFoundError, BundleTamperedError)):
            read_bundle(part, "forget-expert")


def test_an_expert_of_a_substrate_that_was_never_written_is_refused(tmp_path: Path) -> None:
    unwritten = small_substrate()
    with pytest.raises(ValueError, match="needs that of a written substrate"):
        small_expert(unwritten).write(tmp_path / "x", unwritten, training=TRAINING)
    assert not (tmp_path / "x").exists()


# Not a bundle.


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    error = refused(
        BundleNotFoundError, tmp_path / "no", expected="a folder with manifest.json", got="no such"
    )
    assert str(tmp_path / "no") in str(error)
    assert "interrupted" in str(error)


def test_a_folder_without_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    refused(BundleNotFoundError, folder, expected=MANIFEST, got="a folder without one")


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    refused(BundleNotFoundError, folder / WEIGHTS, expected="a folder", got="no such folder")


def test_a_folder_in_place_of_the_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    refused(BundleNotFoundError, folder, expected=MANIFEST, got="a folder without one")


# The manifest.


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\x80\x04\x95", b"\xff\xfe{}", b"[" * 200_000, b'{"seed": ' + b"1" * 5000 + b"}"],
    ids=["empty", "torn", "pickle", "utf-16", "deep", "long-number"],
)
def test_a_manifest_that_is_no_json_is_refused(folder: Path, data: bytes) -> None:
    (folder / MANIFEST).write_bytes(data)
    refused(BundleFormatError, folder, expected="bundle format 1", got="undecodable text")


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("1", "int"), ('"a"', "str")]
)
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: str, kind: str) -> None:
    (folder / MANIFEST).write_text(text)
    refused(BundleFormatError, folder, expected="bundle format 1", got=kind)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
def test_another_format_version_is_refused(folder: Path, version: Any) -> None:
    edit_manifest(folder, lambda raw: raw.update(format_version=version))
    refused(BundleFormatError, folder, expected="format_version 1", got=repr(version))


def test_a_manifest_without_format_version_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda raw: raw.pop("format_version"))
    refused(BundleFormatError, folder, expected="format_version 1", got="None")


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("config",),
        ("base_model",),
        ("training",),
        ("training", "data", "forget"),
        ("sites", "layers.2.o"),
        ("tensors", "layers.2.o.lora_b"),
    ],
    ids=lambda path: ".".join(path) or "top",
)
def test_an_unknown_field_is_refused_wherever_it_stands(
    folder: Path, path: tuple[str, ...]
) -> None:
    def add(raw: dict[str, Any]) -> None:
        for key in path:
            raw = raw[key]
        raw["surprise"] = 1

    edit_manifest(folder, add)
    error = refused(BundleFormatError, folder, expected="bundle format 1", got="surprise")
    assert ".".join((*path, "surprise")) in str(error)


@pytest.mark.parametrize("field", ["kind", "name", "base_model", "config", "files", "training"])
def test_a_missing_field_is_refused(folder: Path, field: str) -> None:
    edit_manifest(folder, lambda raw: raw.pop(field))
    refused(BundleFormatError, folder, expected="bundle format 1", got=f"{field}: Field required")


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"tsallis_q": 1.9},
        {"target_modules": ["experts"]},
        {"entropy_threshold": float("nan")},
        {"router": "learned"},
        {"rank": "many"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_impossible_configuration_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_manifest(folder, lambda raw: raw["config"].update(change))
    refused(BundleFormatError, folder, expected="bundle format 1", got=next(iter(change)))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AlterConfig)])
def test_a_setting_left_to_its_default_is_refused(folder: Path, field: str) -> None:
    """The default of a later version may be another one, and would still pass for this bundle."""
    edit_manifest(folder, lambda raw: raw["config"].pop(field))
    with pytest.raises(BundleFormatError, match="expected") as caught:
        read_bundle(folder, "forget-expert")
    assert caught.value.got is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", "2"), ("rank", 2.0), ("lora_alpha", 16), ("top_k", True), ("tsallis_q", "1.5")],
)
def test_a_setting_of_another_type_is_refused_and_not_converted(
    folder: Path, field: str, value: Any
) -> None:
    edit_manifest(folder, lambda raw: raw["config"].update({field: value}))
    with pytest.raises(BundleFormatError):
        read_bundle(folder, "forget-expert")


@pytest.mark.parametrize("name", ["", "Upper", "under_score", "a/b", "..", "a\n", "a" * 64, "ä"])
def test_a_name_that_is_no_domain_name_is_refused(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda raw: raw.update(name=name))
    refused(BundleFormatError, folder, expected="bundle format 1", got="name: String should match")


def test_the_other_kind_is_refused(folder: Path, substrate: Substrate, tmp_path: Path) -> None:
    refused(BundleFormatError, tmp_path / "substrate", expected="forget-expert", got="substrate")
    with pytest.raises(BundleFormatError, match="expected substrate; got forget-expert"):
        Substrate.read(folder)
    with pytest.raises(BundleFormatError):
        ForgetExpert.read(tmp_path / "substrate", substrate)


def test_an_oversized_manifest_is_refused_unread(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    refused(
        BundleFormatError,
        folder,
        expected=f"at most {MAX_MANIFEST_BYTES} bytes",
        got=f"{MAX_MANIFEST_BYTES + 1} bytes",
    )


def test_an_expert_without_substrate_digest_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda raw: raw.update(substrate_digest=None))
    refused(BundleFormatError, folder, expected="bundle format 1", got="substrate_digest")


# The files.


@pytest.mark.parametrize("keep", [0, 7, 400, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    error = refused(
        BundleTamperedError,
        folder,
        expected="sha256 ",
        got=f"over {len(data[:keep])} bytes",
    )
    assert WEIGHTS in str(error)


def test_any_flipped_byte_is_refused(folder: Path) -> None:
    for name in (WEIGHTS, EVALUATION):
        path = folder / name
        original = path.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1}:
            damaged = bytearray(original)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            refused(BundleTamperedError, folder, expected="sha256", got="sha256")
        path.write_bytes(original)
    read_bundle(folder, "forget-expert")


@pytest.mark.parametrize("name", ["extra.bin", "pytorch_model.bin", ".hidden", "sub"])
def test_a_file_that_is_not_listed_is_refused(folder: Path, name: str) -> None:
    if name == "sub":
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(b"")
    refused(BundleTamperedError, folder, expected=WEIGHTS, got=name)


@pytest.mark.parametrize("name", [WEIGHTS, EVALUATION])
def test_a_listed_file_that_is_missing_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(BundleTamperedError, folder, expected=name, got="none")


@pytest.mark.parametrize("name", [WEIGHTS, EVALUATION])
def test_a_symlinked_file_is_refused_though_its_content_fits(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(BundleTamperedError, folder, expected="a plain file", got=None)


def test_a_listed_folder_is_refused(folder: Path) -> None:
    (folder / "sub").mkdir()
    edit_manifest(folder, lambda raw: raw["files"].update({"sub": "a" * 64}))
    refused(BundleTamperedError, folder, expected="a plain file", got=None)


@pytest.mark.parametrize("name", ["../secret", "./weights.safetensors", "sub/secret", "/secret"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    name = str(tmp_path / "secret") if name.startswith("/") else name
    edit_manifest(folder, lambda raw: raw["files"].update({name: digest}))
    refused(BundleTamperedError, folder, expected=name, got="none")


def test_a_manifest_that_lists_no_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    edit_manifest(folder, lambda raw: raw["files"].pop(WEIGHTS))
    refused(BundleTamperedError, folder, expected=WEIGHTS, got="none")


@pytest.mark.parametrize("data", [b"[1]", b"{", b"\x80\x04"])
def test_an_evaluation_that_is_no_json_object_is_refused(folder: Path, data: bytes) -> None:
    replace_file(folder, EVALUATION, data)
    error = refused(
        BundleFormatError,
        folder,
        expected="bundle format 1",
        got="list" if data == b"[1]" else "undecodable text",
    )
    assert EVALUATION in str(error)


# The tensors: forged with fitting digests, so that only their own check is left.


class Bomb:
    """Pickles to a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(
    folder: Path, tmp_path: Path
) -> None:
    crater = tmp_path / "crater"
    replace_file(folder, WEIGHTS, pickle.dumps({"layers.2.o.lora_b": Bomb(crater)}))
    refused(BundleTensorError, folder, expected="a safetensors file", got="SafetensorError")
    torch.save({"a": Bomb(crater)}, tmp_path / "zipped.pt")
    replace_file(folder, WEIGHTS, (tmp_path / "zipped.pt").read_bytes())
    refused(BundleTensorError, folder, expected="a safetensors file", got="SafetensorError")
    assert not crater.exists()


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_a_dtype_that_torch_cannot_hold_is_refused(folder: Path, dtype: str) -> None:
    size = 1 if dtype == "F4" else 2
    header = {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}
    replace_file(folder, WEIGHTS, raw_safetensors(header, bytes(size)))
    refused(BundleTensorError, folder, expected="a safetensors file", got=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.2.o.lora_b", "evidence.fc2.bias", "router.scalar_weight"])
def test_a_value_that_is_not_finite_is_refused(folder: Path, name: str, value: float) -> None:
    replace_tensors(folder, lambda tensors: tensors[name].view(-1)[0:1].fill_(value), reindex=True)
    error = refused(BundleTensorError, folder, expected="finite values", got="1 that are not")
    assert name in str(error)
    assert error.fix is not None


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64]
)
def test_an_unsupported_dtype_is_refused(folder: Path, dtype: torch.dtype) -> None:
    name = "layers.2.o.lora_b"
    replace_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}), reindex=True)
    refused(BundleTensorError, folder, expected="torch.bfloat16", got=str(dtype))


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "shape": lambda t: t.update({"layers.2.o.lora_b": torch.zeros(2, 6).bfloat16()}),
    "dtype": lambda t: t.update({"layers.2.o.lora_b": t["layers.2.o.lora_b"].float()}),
    "missing": lambda t: t.pop("layers.2.o.lora_b"),
    "extra": lambda t: t.update({"layers.2.o.lora_c": torch.zeros(3)}),
    "renamed": lambda t: t.update({"layers.2.o.lora_c": t.pop("layers.2.o.lora_b")}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_differ_from_the_manifest_are_refused(folder: Path, change: str) -> None:
    replace_tensors(folder, CHANGES[change], reindex=False)
    expected = "no such tensor" if change == "extra" else "(6, 2)"
    got = {
        "shape": "(2, 6)",
        "dtype": "float32",
        "missing": "no such tensor",
        "renamed": "no such tensor",
        "extra": "(3,)",
    }[change]
    error = refused(BundleTensorError, folder, expected=expected, got=got)
    assert "layers.2.o.lora_" in str(error)


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "dtype"])
def test_tensors_that_differ_from_the_configuration_are_refused(
    folder: Path, substrate: Substrate, change: str
) -> None:
    """The manifest's index was forged as well: only the substrate knows what must be there."""
    replace_tensors(folder, CHANGES[change], reindex=True)
    read_bundle(folder, "forget-expert")
    with pytest.raises(BundleTensorError, match="wrong shape for its configuration") as caught:
        ForgetExpert.read(folder, substrate)
    assert "layers.2.o.lora_" in str(caught.value)
    assert caught.value.expected is not None
    assert caught.value.got is not None


def test_a_transposed_a_is_refused(substrate: Substrate, tmp_path: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.2.qkv.lora_a"] = tensors["layers.2.qkv.lora_a"].T.contiguous()

    replace_tensors(tmp_path / "substrate", transpose, reindex=True)
    with pytest.raises(BundleTensorError, match=r"expected \(2, 6\); got \(6, 2\)"):
        Substrate.read(tmp_path / "substrate")


def test_retain_tensors_must_fit_the_mode(tmp_path: Path) -> None:
    """`identity` promises that a retained token is the base model's: no B_r may hide there."""
    small_substrate(retain_expert="trained").write(tmp_path / "x", name="base", training=TRAINING)
    edit_manifest(tmp_path / "x", lambda raw: raw["config"].update(retain_expert="identity"))
    with pytest.raises(BundleTensorError, match=r"retain\.lora_b.*expected no such tensor"):
        Substrate.read(tmp_path / "x")


# What it was made for.


def test_another_base_model_is_refused(substrate: Substrate, folder: Path, tmp_path: Path) -> None:
    other = BASE_MODEL.model_copy(update={"fingerprint": "6" * 64, "name": "elsewhere"})
    with pytest.raises(BaseModelMismatchError) as caught:
        Substrate.read(tmp_path / "substrate", other)
    assert caught.value.expected == f"elsewhere ({'6' * 16})"
    assert caught.value.got == f"nowhere ({'5' * 16})"
    assert caught.value.fix is not None
    with pytest.raises(BaseModelMismatchError):
        ForgetExpert.read(folder, dataclasses.replace(substrate, base_model=other))


def test_the_same_base_model_under_another_name_is_accepted(
    substrate: Substrate, tmp_path: Path
) -> None:
    moved = BASE_MODEL.model_copy(update={"name": "moved"})
    assert Substrate.read(tmp_path / "substrate", moved).digest == substrate.digest


def test_another_substrate_is_refused(substrate: Substrate, folder: Path, tmp_path: Path) -> None:
    other = small_substrate(top_k=2).write(tmp_path / "other", name="base", training=TRAINING)
    with pytest.raises(SubstrateMismatchError) as caught:
        ForgetExpert.read(folder, other)
    assert (caught.value.expected, caught.value.got) == (other.digest, substrate.digest)
    assert caught.value.fix is not None
    with pytest.raises(SubstrateMismatchError):
        ForgetExpert.read(folder, dataclasses.replace(substrate, digest=None))


# No forgotten text.


def string_places(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> schema of every place where a manifest may hold a string."""
    definitions = schema.get("$defs", {})
    places: dict[str, dict[str, Any]] = {}

    def walk(node: dict[str, Any], path: str) -> None:
        if "$ref" in node:
            node = definitions[node["$ref"].removeprefix("#/$defs/")]
        for choice in node.get("anyOf", ()):
            walk(choice, path)
        if node.get("type") == "string":
            places[path] = node
        for name, child in node.get("properties", {}).items():
            walk(child, f"{path}.{name}" if path else name)
        for keyword in ("items", "additionalProperties"):
            if isinstance(node.get(keyword), dict):
                walk(node[keyword], f"{path}.*")
        for child in node.get("prefixItems", ()):
            walk(child, f"{path}.*")

    walk(schema, "")
    return places


def test_a_manifest_has_no_place_for_training_rows() -> None:
    """Each free string is a name, a digest, a version or one setting: none is a list of texts."""
    places = string_places(Manifest.model_json_schema())
    free = {
        path
        for path, node in places.items()
        if not node.keys() & {"enum", "const", "pattern", "format"}
    }
    assert free == {
        "base_model.name",
        "base_model.architecture",
        "base_model.fingerprint",
        "substrate_digest",
        "config.target_modules.*",
        "tensors.*.dtype",
        "files.*",
        "training.method",
        "training.settings.*",
        "training.versions.*",
    }
    assert "training.data.*.sha256" in places


def test_training_data_are_a_digest_and_a_count() -> None:
    assert DataDigest.model_fields.keys() == {"sha256", "num_rows"}


@pytest.mark.parametrize(
    "text", ["Where was she born?", "a" * 63, "a" * 65, "A" * 64, "a" * 64 + "\n", ""]
)
def test_a_data_digest_holds_no_text(text: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        DataDigest(sha256=text, num_rows=1)


@pytest.mark.parametrize("value", [["row", "row"], {"row": "text"}, ("row",), b"row"])
def test_a_setting_is_a_scalar(value: Any) -> None:
    if value == b"row":
        value = [value]
    with pytest.raises(pydantic.ValidationError):
        Provenance(method="m", data={}, seed=0, settings={"rows": value}, versions={})


def test_a_manifest_is_frozen(folder: Path) -> None:
    manifest = read_manifest(folder)
    with pytest.raises(pydantic.ValidationError):
        manifest.name = "other"  # type: ignore[misc]
