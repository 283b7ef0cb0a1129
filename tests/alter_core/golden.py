"""The golden bundles of format 1. To write them again, after a deliberate change of the format:

python -m tests.alter_core.golden
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from alter_core import Substrate, read_bundle
from alter_core.bundle import write_bundle
from tests.alter_core.crafted import CREATED_AT, TRAINING, small_expert, small_substrate

GOLDEN = Path(__file__).parents[1] / "golden"
EVALUATION = {"forget_probability": 0.0625, "retain_probability": 0.9375}


def write_golden(folder: Path) -> None:
    """Writes a substrate and a forget expert of a few KB each, the same ones every time."""
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch)
        small_substrate(retain_expert="trained").write(
            draft / "substrate", name="golden", training=TRAINING
        )
        _with_fixed_date(draft / "substrate", folder / "substrate")
        substrate = Substrate.read(folder / "substrate")
        small_expert(substrate, "golden-domain").write(
            draft / "forget-expert", substrate, training=TRAINING, evaluation=EVALUATION
        )
        _with_fixed_date(draft / "forget-expert", folder / "forget-expert")


def _with_fixed_date(draft: Path, target: Path) -> None:
    bundle = read_bundle(draft, "substrate" if draft.name == "substrate" else "forget-expert")
    manifest = bundle.manifest.model_copy(update={"created_at": CREATED_AT})
    write_bundle(target, manifest, bundle.tensors, bundle.evaluation)


if __name__ == "__main__":
    for kind in ("substrate", "forget-expert"):
        shutil.rmtree(GOLDEN / kind, ignore_errors=True)
    write_golden(GOLDEN)
