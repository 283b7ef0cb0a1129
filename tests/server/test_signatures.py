"""Bundles that no trusted key has signed as they are do not get in."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alter_core import ForgetExpert, Substrate, read_bundle
from alter_core.errors import (
    BundleNotFoundError,
    BundleSignatureError,
    BundleTamperedError,
    ConfigError,
)
from server.registry import BundleStore
from server.signatures import MAX_SIGNATURE_BYTES, SignaturePolicy, sign_bundle, signed_digest
from tests.alter_core.crafted import (
    TRAINING,
    edit_manifest,
    replace_file,
    small_expert,
    small_substrate,
)
from tests.support.keys import KeyPair, make_key_pair

SIGNATURE = "model.sig"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyPair, KeyPair]:
    """(trusted, another)."""
    folder = tmp_path_factory.mktemp("keys")
    return make_key_pair(folder, "trusted"), make_key_pair(folder, "another")


@pytest.fixture
def policy(keys: tuple[KeyPair, KeyPair]) -> SignaturePolicy:
    return SignaturePolicy.build(None, [keys[0].public])


@pytest.fixture
def substrate(tmp_path: Path) -> Substrate:
    return small_substrate().write(tmp_path / "substrate", name="base", training=TRAINING)


@pytest.fixture
def folder(substrate: Substrate, tmp_path: Path) -> Path:
    """An unsigned expert."""
    target = tmp_path / "inbox" / "expert"
    small_expert(substrate).write(target, substrate, training=TRAINING, evaluation={"x": 0.5})
    return target


@pytest.fixture
def signed(folder: Path, keys: tuple[KeyPair, KeyPair]) -> Path:
    sign_bundle(folder, keys[0].private)
    return folder


def read(folder: Path, policy: SignaturePolicy) -> str:
    return policy.read(folder, lambda folder: read_bundle(folder, "forget-expert")).digest


def test_a_bundle_signed_with_a_trusted_key_is_read(
    signed: Path, policy: SignaturePolicy, substrate: Substrate, keys: tuple[KeyPair, KeyPair]
) -> None:
    digest = ForgetExpert.read(signed, substrate).digest
    assert read(signed, policy) == digest
    assert signed_digest(signed, [keys[1].public, keys[0].public]) == digest


def _change_weights(folder: Path, keys: tuple[KeyPair, KeyPair]) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _forge(folder: Path, keys: tuple[KeyPair, KeyPair]) -> None:
    """All digests of the manifest fit."""
    data = (folder / "weights.safetensors").read_bytes()
    replace_file(folder, "weights.safetensors", data[:-2] + b"\x00\x3f")


def _flip_signature(folder: Path, keys: tuple[KeyPair, KeyPair]) -> None:
    envelope = json.loads((folder / SIGNATURE).read_text())
    sig = envelope["dsseEnvelope"]["signatures"][0]["sig"]
    envelope["dsseEnvelope"]["signatures"][0]["sig"] = ("A" if sig[9] != "A" else "B").join(
        (sig[:9], sig[10:])
    )
    (folder / SIGNATURE).write_text(json.dumps(envelope))


TAMPERINGS: dict[str, Callable[[Path, tuple[KeyPair, KeyPair]], object]] = {
    "unsigned": lambda folder, keys: (folder / SIGNATURE).unlink(),
    "another key": lambda folder, keys: sign_bundle(folder, keys[1].private),
    "weights": _change_weights,
    "weights and digests": _forge,
    "manifest": lambda folder, keys: edit_manifest(folder, lambda raw: raw.update(name="other")),
    "manifest reformatted": lambda folder, keys: edit_manifest(folder, lambda raw: None),
    "evaluation removed": lambda folder, keys: (folder / "evaluation.json").unlink(),
    "file added": lambda folder, keys: (folder / "more.bin").write_bytes(b"x"),
    "git file added": lambda folder, keys: (folder / ".gitignore").write_bytes(b"x"),
    "signature flipped": _flip_signature,
    "signature empty": lambda folder, keys: (folder / SIGNATURE).write_bytes(b""),
    "signature no json": lambda folder, keys: (folder / SIGNATURE).write_bytes(b"\xff{"),
    "signature null": lambda folder, keys: (folder / SIGNATURE).write_text("null"),
    "signature nested": lambda folder, keys: (folder / SIGNATURE).write_text("[" * 100_000),
    "signature huge": lambda folder, keys: (folder / SIGNATURE).write_bytes(
        (folder / SIGNATURE).read_bytes() + b" " * MAX_SIGNATURE_BYTES
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_anything_else_is_refused_before_a_tensor_is_read(
    name: str, signed: Path, policy: SignaturePolicy, keys: tuple[KeyPair, KeyPair]
) -> None:
    TAMPERINGS[name](signed, keys)

    def reader(folder: Path) -> ForgetExpert:
        raise AssertionError("the bundle was read")

    with pytest.raises(BundleSignatureError) as caught:
        policy.read(signed, reader)
    assert caught.value.fix


def test_a_signature_that_is_a_link_does_not_count(
    signed: Path, policy: SignaturePolicy, tmp_path: Path
) -> None:
    (signed / SIGNATURE).rename(tmp_path / "elsewhere")
    (signed / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleSignatureError, match="not signed"):
        read(signed, policy)


def test_the_signature_of_another_bundle_does_not_count(
    signed: Path, substrate: Substrate, policy: SignaturePolicy, tmp_path: Path
) -> None:
    other = tmp_path / "inbox" / "other"
    small_expert(substrate, "other").write(other, substrate, training=TRAINING)
    shutil.copy(signed / SIGNATURE, other / SIGNATURE)
    with pytest.raises(BundleSignatureError, match="does not verify"):
        read(other, policy)


def test_a_bundle_that_is_exchanged_after_its_signature_was_verified_is_refused(
    signed: Path, substrate: Substrate, policy: SignaturePolicy, tmp_path: Path
) -> None:
    other = tmp_path / "inbox" / "other"
    small_expert(substrate, "other").write(other, substrate, training=TRAINING)
    with pytest.raises(BundleSignatureError, match="not the one that was signed"):
        policy.read(signed, lambda folder: read_bundle(other, "forget-expert"))


def test_where_there_is_no_bundle_the_signature_is_not_blamed(
    policy: SignaturePolicy, tmp_path: Path
) -> None:
    with pytest.raises(BundleNotFoundError):
        read(tmp_path / "none", policy)


@pytest.mark.parametrize("name", ["unsigned", "another key", "manifest reformatted"])
def test_warn_serves_it_and_says_so(
    name: str,
    signed: Path,
    substrate: Substrate,
    keys: tuple[KeyPair, KeyPair],
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = SignaturePolicy.build("warn", [keys[0].public])
    with caplog.at_level(logging.WARNING, "server.signatures"):
        digest = read(signed, policy)
        assert caplog.records == []
        TAMPERINGS[name](signed, keys)
        assert read(signed, policy) == digest
    assert len(caplog.records) == 1


def test_off_looks_at_no_signature(signed: Path) -> None:
    (signed / SIGNATURE).write_bytes(b"junk")
    read(signed, SignaturePolicy())


def test_keys_alone_mean_require_and_contradictions_are_refused(
    keys: tuple[KeyPair, KeyPair],
) -> None:
    public = [keys[0].public]
    assert SignaturePolicy.build(None, public).mode == "require"
    assert SignaturePolicy.build(None, []).mode == "off"
    for mode in ("require", "warn"):
        with pytest.raises(ConfigError, match="contradict"):
            SignaturePolicy.build(mode, [])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="contradict"):
        SignaturePolicy.build("off", public)


def test_a_key_that_is_gone_trusts_nobody(
    signed: Path, keys: tuple[KeyPair, KeyPair], tmp_path: Path
) -> None:
    key = Path(shutil.copy(keys[0].public, tmp_path / "key.pem"))
    policy = SignaturePolicy.build(None, [key])
    read(signed, policy)
    key.unlink()
    with pytest.raises(BundleSignatureError):
        read(signed, policy)


def test_the_store_takes_and_gives_only_what_is_signed(
    folder: Path, policy: SignaturePolicy, keys: tuple[KeyPair, KeyPair], tmp_path: Path
) -> None:
    root, cache = str(tmp_path / "store"), tmp_path / "cache"
    store = BundleStore(root, signatures=policy)
    with pytest.raises(BundleSignatureError):
        store.put(folder)
    sign_bundle(folder, keys[1].private)
    with pytest.raises(BundleSignatureError):
        store.put(folder)
    assert list((tmp_path / "store" / "sha256").iterdir()) == []

    # One that does not look at signatures has put it there.
    digest = BundleStore(root).put(folder)
    with pytest.raises(BundleSignatureError):
        store.fetch(digest, cache)
    with pytest.raises(BundleSignatureError):
        store.local(digest, cache)
    BundleStore(root).fetch(digest, cache)  # nor does the cache make it trusted
    with pytest.raises(BundleSignatureError):
        store.fetch(digest, cache)

    sign_bundle(folder, keys[0].private)
    assert store.put(folder) == digest
    fetched = store.fetch(digest, cache)
    assert (fetched / SIGNATURE).read_bytes() == (folder / SIGNATURE).read_bytes()
    assert store.fetch(digest, cache) == fetched
    assert read(store.local(digest, cache), policy) == digest
    (fetched / "weights.safetensors").write_bytes(b"torn")
    assert read(store.fetch(digest, cache), policy) == digest


def test_a_damaged_bundle_in_a_store_without_policy_is_still_refused(
    signed: Path, tmp_path: Path
) -> None:
    store = BundleStore(str(tmp_path / "store"))
    digest = store.put(signed)
    place = tmp_path / "store" / "sha256" / digest.removeprefix("sha256:")
    (place / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(BundleTamperedError):
        store.fetch(digest, tmp_path / "cache")
