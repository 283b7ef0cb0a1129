"""Signatures of bundles: OpenSSF model signatures by an elliptic-curve key pair, in `model.sig`.

A signature covers every other file, so also the manifest whose digest names the bundle. It is verified
before any tensor is read; what is read afterwards must have the digest that was signed, so that files
exchanged in between are found. Nothing of this needs a network.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from alter_core.bundle import MANIFEST, SIGNATURE, read_manifest
from alter_core.errors import BundleSignatureError, ConfigError

logger = logging.getLogger(__name__)

SignatureMode = Literal["require", "warn", "off"]
MAX_SIGNATURE_BYTES = 2**20


class _Digested(Protocol):
    @property
    def digest(self) -> str | None: ...


T = TypeVar("T", bound=_Digested)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignaturePolicy:
    """Which bundles may be used: by default all of them."""

    mode: SignatureMode = "off"
    """`require` refuses, `warn` logs what no trusted key has signed; `off` looks at no signature."""
    trusted_keys: tuple[Path, ...] = ()
    """PEM files of public keys; each is read anew for every bundle."""

    def __post_init__(self) -> None:
        if (self.mode == "off") == bool(self.trusted_keys):
            raise ConfigError(
                "Trusted keys and the mode of signatures contradict each other",
                expected="trusted keys for 'require' and 'warn', and none for 'off'",
                got=f"{self.mode!r} with {len(self.trusted_keys)} keys",
                fix="Set --alter-trusted-keys, or correct --alter-signatures.",
            )
        for key in self.trusted_keys:
            _check_public_key(key)

    @classmethod
    def build(cls, mode: SignatureMode | None, trusted_keys: Sequence[Path]) -> SignaturePolicy:
        """Without a mode, keys mean `require`. Raises: ConfigError."""
        keys = tuple(key.expanduser().absolute() for key in trusted_keys)
        return cls(mode=mode or ("require" if keys else "off"), trusted_keys=keys)

    def read(self, folder: Path, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of the bundle at `folder`, once its signature is verified.

        Raises: BundleSignatureError, or what `reader` raises.
        """
        if self.mode == "off":
            return reader(folder)
        try:
            signed = signed_digest(folder, self.trusted_keys)
        except BundleSignatureError as error:
            self._object(error)
            return reader(folder)
        found = reader(folder)
        if found.digest != signed:
            self._object(
                BundleSignatureError(
                    f"The bundle at {folder} is not the one that was signed",
                    expected=f"{signed}, with a manifest in canonical form",
                    got=str(found.digest),
                    fix="It changed while it was read: find out by whom, and copy it again.",
                )
            )
        return found

    def _object(self, error: BundleSignatureError) -> None:
        if self.mode == "require":
            raise error
        logger.warning("%s", error)


def sign_bundle(folder: Path, private_key: Path) -> Path:
    """Signs the bundle at `folder`; returns the signature's file.

    Raises: ConfigError for a key that cannot be used.
    """
    from model_signing import signing

    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as error:  # of several libraries
        raise _bad_key(private_key, "private", error) from error
    signature = folder / SIGNATURE
    config.set_hashing_config(_hashing()).sign(folder, signature)
    return signature


def signed_digest(folder: Path, public_keys: Sequence[Path]) -> str:
    """The digest of the bundle that one of the keys has signed, from the files as they were hashed.

    Raises: BundleSignatureError; BundleNotFoundError and BundleFormatError if there is no bundle.
    """
    read_manifest(folder)
    signature = folder / SIGNATURE
    if signature.is_symlink() or not signature.is_file():
        raise BundleSignatureError(
            f"The bundle at {folder} is not signed",
            expected=f"{SIGNATURE}, made with a trusted key",
            got="none",
            fix="Sign it with `alter bundle sign`, or ask its maker to.",
        )
    if signature.stat().st_size <= MAX_SIGNATURE_BYTES:
        for key in public_keys:
            if (digest := _verified(folder, signature, key)) is not None:
                return digest
    raise BundleSignatureError(
        f"The signature of the bundle at {folder} does not verify",
        expected=f"{SIGNATURE}, made with a trusted key over these very files",
        got="another key, or files that were changed afterwards",
        fix="Do not serve this bundle; ask its maker to sign it again.",
    )


def _verified(folder: Path, signature: Path, public_key: Path) -> str | None:
    """The signed digest; None if this key has not signed what lies there."""
    from model_signing import verifying

    hashes = _hashing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(hashes).verify(folder, signature)
        return f"sha256:{hashes.sha256[MANIFEST]}"
    except Exception as error:  # a hostile signature may break any of the libraries that parse it
        logger.info("%s has not signed %s (%s)", public_key.name, folder, type(error).__name__)
        return None


def _hashing() -> Any:
    """How files are hashed, by the library; keeps the hashes that `verify` has compared."""
    from model_signing import hashing

    class Recording(hashing.Config):  # type: ignore[misc]
        sha256: dict[str, str]

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            found = super().hash(model_path, files_to_hash=files_to_hash)
            self.sha256 = {
                each.identifier: each.digest.digest_hex for each in found.resource_descriptors()
            }
            return found

    return Recording().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _check_public_key(key: Path) -> None:
    from model_signing import verifying

    try:
        verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # of several libraries
        raise _bad_key(key, "public", error) from error


def _bad_key(key: Path, kind: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"The {kind} key {key} cannot be used",
        expected=f"a PEM file of a {kind} key on P-256, P-384 or P-521",
        got=type(error).__name__,
        fix="Make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out private.pem; "
        "openssl ec -in private.pem -pubout -out public.pem",
    )
