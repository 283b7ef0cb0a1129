"""Elliptic-curve key pairs as PEM files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclasses.dataclass(frozen=True)
class KeyPair:
    """Files of one pair."""

    private: Path
    public: Path


def make_key_pair(folder: Path, name: str) -> KeyPair:
    """Writes a new pair."""
    pair = KeyPair(folder / f"{name}.private.pem", folder / f"{name}.public.pem")
    key = ec.generate_private_key(ec.SECP256R1())
    pair.private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    pair.public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return pair
