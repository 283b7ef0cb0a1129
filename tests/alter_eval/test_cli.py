from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from alter_core import AlterConfig
from alter_core.attach import AttachedModel
from alter_core.entropy import tsallis_entropy
from alter_core.errors import AlterError, ConfigError, EvaluationError
from alter_core.substrate import ForgetExpert, Substrate
from alter_eval import tofu
from alter_eval.cli import eval_app
from alter_eval.traces import trace
from tests.support.tiny import PROVENANCE, random_expert, random_substrate
from tests.trainer.world import World
from trainer.base_model import BaseModel

from .small_tofu import rows_of_set, write_tofu

FORGOTTEN = {"forget_quality", "forget_loss_ks_p", "privleak", "privleak_perturbed"}


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu, "_MAX_NEW_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def bundles(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random substrate and a random expert that speaks up at most tokens."""
    folder = tmp_path_factory.mktemp("bundles")
    config = AlterConfig(tap_layer=1, rank=8, evidence_window=16)
    substrate = random_substrate(world.model, config).write(
        folder / "substrate", name="tiny", training=PROVENANCE
    )
    expert = random_expert(substrate, "red", seed=3, trigger_rate=0.9)
    expert.write(folder / "red", substrate, training=PROVENANCE)
    return folder / "substrate", folder / "red"


def alter_eval(world: World, data: Path, out: Path, *options: object) -> Result:
    arguments = ["tofu", world.model, "--out", out, "--data", data, "--device", "cpu", *options]
    return CliRunner().invoke(eval_app, [str(argument) for argument in arguments])


def figures_in(out: Path) -> dict[str, float | None]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    figures: dict[str, float | None] = json.loads(
        (out / "figures.json").read_text(), parse_constant=refuse
    )
    assert all(math.isfinite(value) for value in figures.values() if value is not None)
    return figures


@pytest.fixture(scope="module")
def plain(
    world: World, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """The base model's evaluation."""
    out = tmp_path_factory.mktemp("plain") / "out"
    result = alter_eval(world, data, out, "--holdout", world.files["general"])
    assert result.exit_code == 0, result.exception
    return out, result


def test_figures_and_a_page_with_plots_are_written(
    world: World, plain: tuple[Path, Result]
) -> None:
    out, result = plain
    figures = figures_in(out)
    assert {name for name, value in figures.items() if value is None} == FORGOTTEN
    page = (out / "report.md").read_text()
    assert all(f"`{name}`" in page for name in figures)
    assert "![](losses.png)" in page
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "entropy.png" not in page, "there is no gate to look into"
    assert "model_utility" in result.stdout
    assert str(out / "report.md") in result.stdout.replace("\n", "")
    told = page + result.output + "".join(p.read_text() for p in out.glob("*.json"))
    assert not [text for text in world.strings() if text in told]


def test_a_finished_evaluation_is_gone_on_with(
    world: World, data: Path, plain: tuple[Path, Result]
) -> None:
    out, _ = plain
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    result = alter_eval(world, data, out, "--holdout", world.files["general"])
    assert result.exit_code == 0, result.exception
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert {path.name for path in before if before[path] != after[path]} == {"figures.json"}


def test_experts_change_the_figures_and_are_compared_with_the_retrained_model(
    world: World,
    data: Path,
    plain: tuple[Path, Result],
    bundles: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    (substrate, expert), (reference, _), out = bundles, plain, tmp_path / "out"
    options = ["--substrate", substrate, "--domain", f"red={expert}", "--retrained", reference]
    options += ["--holdout", world.files["general"]]
    result = alter_eval(world, data, out, *options)
    assert result.exit_code == 0, result.exception
    figures, before = figures_in(out), figures_in(reference)
    assert None not in figures.values()
    assert (figures["forget_Q_A_Prob"] or 0) < (before["forget_Q_A_Prob"] or 0)
    page = (out / "report.md").read_text()
    for plot in ("losses.png", "entropy.png", "routing.png"):
        assert f"![]({plot})" in page
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    key = json.loads((out / "run.json").read_text())
    assert list(key["experts"]) == ["red"]


def test_without_domains_a_substrate_is_still_another_evaluation(
    world: World, data: Path, plain: tuple[Path, Result], bundles: tuple[Path, Path]
) -> None:
    out, _ = plain
    options = ["--substrate", bundles[0], "--holdout", world.files["general"]]
    result = alter_eval(world, data, out, *options)
    assert isinstance(result.exception, EvaluationError)
    assert "another evaluation" in str(result.exception)


def test_the_retrained_model_compared_with_itself(
    world: World, data: Path, plain: tuple[Path, Result]
) -> None:
    out, _ = plain
    options = ["--holdout", world.files["general"], "--retrained", out]
    result = alter_eval(world, data, out, *options)
    assert result.exit_code == 0, result.exception
    figures = figures_in(out)
    assert figures["forget_quality"] == 1
    assert figures["privleak"] == 0


def test_a_server_of_the_same_model_has_the_same_figures(
    world: World, data: Path, plain: tuple[Path, Result], server: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--server", server, "--holdout", world.files["general"]]
    result = alter_eval(world, data, out, *options)
    assert result.exit_code == 0, result.exception
    found, expected = figures_in(out), figures_in(plain[0])
    for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength", "model_utility"):
        assert found[name] == pytest.approx(expected[name], abs=0.03), name  # float32 and bf16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "http://x", "--substrate", "y"], "neither --substrate nor --domain"),
        (["--server", "http://x", "--domain", "red=y"], "neither --substrate nor --domain"),
        (["--domain", "red=y"], "Experts need their substrate"),
    ],
)
def test_options_that_contradict_each_other_are_refused_first(
    world: World, tmp_path: Path, options: list[str], message: str
) -> None:
    result = alter_eval(world, tmp_path / "no-data", tmp_path / "out", *options)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_retrained_model_of_other_rows_is_refused(
    world: World, plain: tuple[Path, Result], tmp_path: Path
) -> None:
    data = write_tofu(tmp_path / "data", num_rows=2)
    result = alter_eval(world, data, tmp_path / "out", "--retrained", plain[0])
    assert isinstance(result.exception, AlterError)
    assert "another number of rows" in str(result.exception)


def test_a_trace_tells_entropy_and_expert_of_every_token(
    base: BaseModel, bundles: tuple[Path, Path]
) -> None:
    rows = tofu.encode(base.tokenizer, rows_of_set("forget", 3))
    substrate = Substrate.read(bundles[0], base.info)
    attached = AttachedModel(base.model, substrate, [ForgetExpert.read(bundles[1], substrate)])
    try:
        found = trace(attached, rows)
        weights = attached.routing
    finally:
        attached.detach()
    assert weights is None, "the last pass was the base model's"
    assert found.threshold == substrate.config.entropy_threshold
    for row, entropy, expert, is_answer in zip(
        rows, found.entropy, found.expert, found.is_answer, strict=True
    ):
        assert len(row.ids) == len(entropy) == len(expert)
        assert set(expert.tolist()) <= {0, 1}
        assert is_answer.tolist() == list(row.is_answer)
        logits = base.model(input_ids=torch.tensor([row.ids])).logits[0]
        expected = tsallis_entropy(logits, substrate.config.tsallis_q).numpy()
        np.testing.assert_allclose(entropy, expected, rtol=1e-5)
    assert any(expert.any() for expert in found.expert)
