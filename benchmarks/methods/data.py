"""The releases of the data that the table is made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from alter_core.errors import EvaluationError

RELEASES = {
    "tofu/full.json": "667baef2f26f781f1328701d8ea54bf25123ff22fb2d98574c96cd991cb54086",
    "tofu/forget10_perturbed.json": "6fbcb946c57ea1d7b2124cea0e61bf3b5409d1bc10d02368f090109450ed73c7",
    "tofu/retain_perturbed.json": "fc69f33bad70d3dca65920bdb54380039e3e8872dd16bbae20c1a839b99533fb",
    "tofu/real_authors_perturbed.json": "a23255383ac75a5fbe5acd57622a03fb9c368954fd7b2428afa152b784d9533a",
    "tofu/world_facts_perturbed.json": "0e171838040d0ec94b1ce248d891508e85e3b77344370077caa27b61898eb3e1",
    "rwku/forget_level1.jsonl": "339b88255c90bf8aade9eeec47118dfbd844c60510f03d4b7de4dfabe7666dd5",
    "rwku/forget_level2.jsonl": "a9e380506fd01bdbf8116b470baeb5d83c2934ffacf531258c79e7820ced5352",
    "rwku/forget_level3.jsonl": "b88983b36119f362934c70b3db409d48fade85bbaafd063ffabfab43e99955f8",
    "rwku/neighbor_level1.jsonl": "138f68d632b89b11932fc7b7c8b856985e0582ae28330503785096f0571f8cdb",
    "rwku/neighbor_level2.jsonl": "46e726f2ec54cb34a979ad5a2a9abf99ca5e754f8b8cc8657be18d951722c74f",
}
"""SHA-256 by file."""


def check_release(data: Path) -> None:
    """Raises: EvaluationError naming the first file that is missing, or not the one that is meant."""
    for name, digest in RELEASES.items():
        try:
            found = hashlib.sha256((data / name).read_bytes()).hexdigest()
        except OSError as error:
            found = type(error).__name__
        if found != digest:
            raise EvaluationError(
                f"{data / name} is of another version than this table's",
                expected=f"SHA-256 {digest[:12]}",
                got=found[:12] if found.isalnum() and len(found) == len(digest) else found,
                fix="Name a folder with TOFU and RWKU as published in ALTER_DATA_DIR.",
            )
