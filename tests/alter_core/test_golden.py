"""Bundles written by an earlier version stay readable, with the same digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import torch

from alter_core import ForgetExpert, Manifest, Substrate, read_bundle, read_manifest
from tests.alter_core.crafted import CREATED_AT, TRAINING, small_expert, small_substrate
from tests.alter_core.golden import EVALUATION, GOLDEN, write_golden

Kind = Literal["substrate", "forget-expert"]
KINDS: tuple[Kind, ...] = ("substrate", "forget-expert")
DIGESTS: dict[Kind, str] = {
    "substrate": "sha256:748a64f914978f15641d3c76c49a5b47b38c98502b4755e3a5d470af6da1e5a0",
    "forget-expert": "sha256:53ad83dac0e7c52bf7a1cb72470d1aecaa8d2289e6e22487a0bd9599b9a7acf8",
}
SCHEMA = Path(__file__).parents[2] / "docs" / "bundle-manifest.schema.json"


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_of_a_golden_bundle_never_changes(kind: Kind) -> None:
    assert read_bundle(GOLDEN / kind, kind).digest == DIGESTS[kind]


def test_the_golden_substrate_holds_what_was_written() -> None:
    substrate = Substrate.read(GOLDEN / "substrate")
    assert substrate.digest == DIGESTS["substrate"]
    assert substrate.config == small_substrate(retain_expert="trained").config
    assert list(substrate.sites) == ["layers.2.o", "layers.2.qkv"]
    assert substrate.lora_a["layers.2.qkv"].dtype is torch.bfloat16
    assert substrate.lora_a["layers.2.qkv"][0].tolist() == [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125]
    assert substrate.lora_a["layers.2.o"][1, :3].tolist() == [1.5, 1.5625, 1.625]
    assert substrate.retain_lora_b["layers.2.o"].shape == (6, 2)
    assert substrate.retain_lora_b["layers.2.o"][0].tolist() == [-1, -0.9375]
    assert substrate.embedding_mean.tolist() == [-0.5, -0.4375, -0.375, -0.3125, -0.25, -0.1875]
    assert substrate.embedding_std[0].item() == 0.5
    assert substrate.estimator.fc1.weight[0, 1].item() == 0.0625
    assert substrate.estimator.fc2.bias.item() == 3


def test_the_golden_expert_holds_what_was_written() -> None:
    expert = ForgetExpert.read(GOLDEN / "forget-expert", Substrate.read(GOLDEN / "substrate"))
    assert expert.name == "golden-domain"
    assert expert.digest == DIGESTS["forget-expert"]
    assert expert.evaluation == EVALUATION
    assert expert.scalar_weight == 0.75
    assert expert.lora_b["layers.2.qkv"].shape == (10, 2)
    assert expert.lora_b["layers.2.qkv"][0].tolist() == [2, 2.0625]
    assert expert.evidence.fc1.weight.shape == (5, 18)
    assert expert.evidence.fc1.weight[0, :2].tolist() == [0, 0.0625]
    assert expert.evidence.fc2.bias.tolist() == [-3]


def test_the_golden_manifest_tells_when_and_from_what() -> None:
    manifest = read_manifest(GOLDEN / "forget-expert")
    assert manifest.created_at == CREATED_AT
    assert manifest.training == TRAINING
    assert manifest.substrate_digest == DIGESTS["substrate"]
    assert sorted(manifest.files) == ["evaluation.json", "weights.safetensors"]


def test_the_golden_files_on_disk_are_canonical() -> None:
    for kind in KINDS:
        manifest = read_manifest(GOLDEN / kind)
        assert (GOLDEN / kind / "manifest.json").read_bytes() == manifest.canonical_json()


def test_the_same_content_is_written_as_it_was_then(tmp_path: Path) -> None:
    write_golden(tmp_path)
    for kind in KINDS:
        now, then = read_bundle(tmp_path / kind, kind), read_bundle(GOLDEN / kind, kind)
        assert now.manifest == then.manifest
        assert now.tensors.keys() == then.tensors.keys()
        assert all(torch.equal(now.tensors[name], t) for name, t in then.tensors.items())


def test_a_bundle_is_its_content_and_not_its_moment(tmp_path: Path) -> None:
    """The date is in the manifest: two runs give two digests, but the same tensors and files."""
    substrate = Substrate.read(GOLDEN / "substrate")
    small_expert(substrate, "golden-domain").write(
        tmp_path / "now", substrate, training=TRAINING, evaluation=EVALUATION
    )
    now, then = read_manifest(tmp_path / "now"), read_manifest(GOLDEN / "forget-expert")
    assert now.digest != then.digest
    assert now.model_copy(update={"created_at": then.created_at}) == then


# The JSON Schema.


def test_the_published_schema_is_that_of_the_code() -> None:
    expected = json.dumps(Manifest.model_json_schema(), indent=2) + "\n"
    assert SCHEMA.read_text() == expected, (
        "the manifest has changed: write json.dumps(Manifest.model_json_schema(), indent=2) "
        f"and a line end to {SCHEMA.name}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_manifest_fits_the_published_schema(kind: Kind) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    raw = json.loads((GOLDEN / kind / "manifest.json").read_text())
    jsonschema.validate(raw, schema)
    damaged: list[dict[str, Any]] = [
        raw | {"format_version": 2},
        raw | {"kind": "adapter"},
        raw | {"unknown": 1},
        {key: value for key, value in raw.items() if key != "files"},
    ]
    for candidate in damaged:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(candidate, schema)
