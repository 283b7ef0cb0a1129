"""`alter bundle inspect | verify | sign`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alter_cli.bundle import bundle_app
from alter_core import read_manifest
from alter_core.errors import (
    BundleNotFoundError,
    BundleSignatureError,
    BundleTamperedError,
    ConfigError,
)
from tests.support.tiny import TinyBundles, make_bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    return make_bundles(tmp_path_factory.mktemp("bundles"), num_experts=1)


@pytest.fixture
def expert(bundles: TinyBundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles.experts["domain-0"], tmp_path / "expert"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(private, public) elliptic-curve keys."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "private.pem", folder / "public.pem"
    generate = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(generate, check=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(bundle_app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_shows_the_digest_and_the_manifest_itself(expert: Path) -> None:
    manifest = read_manifest(expert)
    assert "domain-0" in _run("inspect", expert)
    assert _run("inspect", expert, "--json").encode() == manifest.canonical_json() + b"\n"


def test_verify_accepts_a_whole_bundle_and_names_its_digest(
    bundles: TinyBundles, expert: Path
) -> None:
    assert read_manifest(expert).digest in _run("verify", expert)
    assert "substrate" in _run("verify", bundles.substrate)


def test_verify_refuses_a_changed_bundle(expert: Path) -> None:
    weights = expert / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleTamperedError, match="does not match its manifest"):
        _run("verify", expert)


def test_signed_bundle_verifies_with_its_key_and_with_no_other(
    expert: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    _run("sign", expert, "--private-key", private)
    _run("verify", expert, "--public-key", public)
    _run("verify", expert)

    other = tmp_path / "other.pem"
    generate = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
    key = subprocess.run(generate, check=True, capture_output=True).stdout
    public_other = subprocess.run(
        ["openssl", "ec", "-pubout"], input=key, check=True, capture_output=True
    ).stdout
    other.write_bytes(public_other)
    with pytest.raises(BundleSignatureError):
        _run("verify", expert, "--public-key", other)
    _run("verify", expert, "--public-key", other, "--public-key", public)


def test_keys_that_cannot_be_used_are_named(
    expert: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    (tmp_path / "junk.pem").write_text("junk")
    for key in (private, tmp_path / "junk.pem", tmp_path / "none.pem"):
        with pytest.raises(ConfigError, match=f"public key .*{key.name}"):
            _run("verify", expert, "--public-key", key)
    for key in (public, tmp_path / "junk.pem", tmp_path / "none.pem"):
        with pytest.raises(ConfigError, match=f"private key .*{key.name}"):
            _run("sign", expert, "--private-key", key)
    assert not (expert / "model.sig").exists()


def test_changed_manifest_fails_the_signature_even_if_its_digests_fit(
    expert: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    _run("sign", expert, "--private-key", private)
    manifest = expert / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed":0', '"seed":1'))
    _run("verify", expert)
    with pytest.raises(BundleSignatureError):
        _run("verify", expert, "--public-key", public)


def test_unsigned_bundle_is_refused_where_a_key_is_given(
    expert: Path, keys: tuple[Path, Path]
) -> None:
    with pytest.raises(BundleSignatureError):
        _run("verify", expert, "--public-key", keys[1])


def test_folder_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        _run("inspect", tmp_path)
