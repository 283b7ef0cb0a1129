"""`alter train` from files to bundles, on the small world."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from alter_core.bundle import read_bundle, read_manifest
from alter_core.errors import (
    AlterError,
    BundleError,
    ConfigError,
    DomainNameError,
    TrainingDataError,
    TrainingError,
)
from trainer import (
    EvidenceSettings,
    ExpertSettings,
    SubstrateSettings,
    TrainResult,
    TrainSettings,
    train,
)
from trainer.cli import EntropyMask, train_command

from .conftest import settings_for
from .world import FORM_ALONE, World, write_jsonl

QUICK = EvidenceSettings(pointwise_steps=60, bag_steps=90)
SHORT = ExpertSettings(epochs=1, min_steps=7, checkpoint_every=3)


def _quick(world: World, out: Path, *domains: str, **changes: object) -> TrainSettings:
    quick = {"evidence_settings": QUICK, "expert_settings": SHORT, "evaluation_rows": 0}
    return settings_for(world, out, *domains, **(quick | changes))


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_default_settings_forget_each_domain_and_fire_on_nothing_else(trained: TrainResult) -> None:
    for name in ("red", "blue"):
        evaluation = json.loads((trained.experts[name] / "evaluation.json").read_text("utf-8"))
        assert evaluation == trained.evaluation[name]
        assert evaluation["forget_probability"]["before"] > 0.9
        assert evaluation["forget_probability"]["after"] < 0.08
        assert evaluation["rouge_l_recall"]["before"] > 0.9
        assert evaluation["rouge_l_recall"]["after"] < FORM_ALONE
        router = evaluation["router"]
        assert router["first_token_missed"] == 0
        assert not any(value for key, value in router.items() if key.startswith("false_alarm"))


def test_output_is_bundles_and_a_record_and_no_leftovers(trained: TrainResult) -> None:
    out = trained.run_file.parent
    assert {path.name for path in out.iterdir()} == {
        "substrate",
        "red",
        "blue",
        "run.json",
        ".cache",
    }
    substrate = read_bundle(trained.substrate, "substrate").manifest
    record = json.loads(trained.run_file.read_text("utf-8"))
    assert record["substrate"] == substrate.digest
    for name, folder in trained.experts.items():
        manifest = read_bundle(folder, "forget-expert").manifest
        assert manifest.name == name
        assert manifest.substrate_digest == substrate.digest
        assert record["experts"][name] == manifest.digest
        assert manifest.training.data.keys() == {f"forget/{name}", "retain", "general"}
        assert {info.dtype for n, info in manifest.tensors.items() if "lora_b" in n} == {"bfloat16"}
    assert record["config"]["tsallis_q"] == 1.5
    assert record["settings"]["expert.forget_loss"] == "counterfactual"
    assert record["versions"].keys() >= {"torch", "transformers", "python"}
    assert record["timings_s"].keys() >= {"substrate", "red", "red/evidence", "red/expert"}


def test_a_domain_that_the_base_model_does_not_know_is_refused_before_training(
    world: World, tmp_path: Path
) -> None:
    rows = [
        {"question": f"Where was {name} born?", "answer": f"{name} was born in {town}."}
        for name, town in (("Ragnhild Tverberg", "Bodo"), ("Casimir Wolnik", "Lublin"))
    ]
    unknown = write_jsonl(tmp_path / "unknown.jsonl", rows)
    settings = _quick(world, tmp_path / "out", forget={"nobody": unknown})
    with pytest.raises(TrainingError, match="does not know domain 'nobody'") as refused:
        train(settings)
    assert refused.value.fix is not None
    assert "--allow-unknown" in refused.value.fix
    assert not (tmp_path / "out" / "substrate").exists()
    assert "Ragnhild" not in str(refused.value)
    result = train(dataclasses.replace(settings, allow_unknown=True))
    assert result.evaluation["nobody"]["base_loss"]["domain"] > 1


def test_no_text_of_any_row_is_written_or_logged(
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    train(_quick(world, tmp_path / "out", "red", evaluation_rows=2))
    captured = capfd.readouterr()
    said = (captured.out + captured.err + caplog.text).encode()
    written = _files(tmp_path / "out")
    assert written
    for secret in map(str.encode, world.strings()):
        assert secret not in said
        assert not [name for name, data in written.items() if secret in data]


class _InterruptError(Exception):
    pass


class _InterruptingReporter:
    """Stops a run in a named stage, as an operator's Ctrl-C would."""

    def __init__(self, stage: str, step: int) -> None:
        self.name, self.at = stage, step

    @contextlib.contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[_InterruptingReporter]:
        self.current = name
        yield self

    def step(self, completed: int, **figures: float) -> None:
        if self.current == self.name and completed == self.at:
            raise _InterruptError

    def say(self, line: str) -> None:
        pass


@pytest.mark.parametrize("mask", ["threshold", pytest.param("atwu", marks=pytest.mark.slow)])
def test_resumed_run_equals_an_uninterrupted_one(world: World, tmp_path: Path, mask: str) -> None:
    short = dataclasses.replace(SHORT, entropy_mask=mask)  # type: ignore[arg-type]
    whole = train(_quick(world, tmp_path / "whole", "red", "blue", expert_settings=short))
    cut = _quick(world, tmp_path / "cut", "red", "blue", expert_settings=short)
    with pytest.raises(_InterruptError):
        train(cut, _InterruptingReporter("entropy estimator", 5))
    assert not (tmp_path / "cut" / "substrate").exists()
    with pytest.raises(_InterruptError):
        train(dataclasses.replace(cut, resume=True), _InterruptingReporter("blue: expert", 5))
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {"substrate", "red", ".cache", ".checkpoints"}
    red = _files(tmp_path / "cut" / "red")
    with pytest.raises(ConfigError, match="--resume"):
        train(cut)
    resumed = train(dataclasses.replace(cut, resume=True))
    assert _files(tmp_path / "cut" / "red") == red
    for name in ("substrate", "red", "blue"):
        weights = [tmp_path / run / name / "weights.safetensors" for run in ("whole", "cut")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), name
    assert resumed.evaluation["blue"] == whole.evaluation["blue"]
    assert not (tmp_path / "cut" / ".checkpoints").exists()
    again = train(dataclasses.replace(cut, resume=True))
    assert again.run_file == resumed.run_file
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        "substrate",
        "red",
        "blue",
        "run.json",
        ".cache",
    }


def test_resuming_with_other_settings_is_refused(world: World, tmp_path: Path) -> None:
    settings = _quick(world, tmp_path / "out", "red")
    with pytest.raises(_InterruptError):
        train(settings, _InterruptingReporter("red: expert", 5))
    changed = dataclasses.replace(settings, resume=True, seed=1)
    with pytest.raises(TrainingError, match="another run"):
        train(changed)


def test_expert_added_later_leaves_every_existing_byte(
    world: World, trained: TrainResult, tmp_path: Path
) -> None:
    first = train(_quick(world, tmp_path / "out", "red"))
    before = _files(tmp_path / "out")
    later = _quick(world, tmp_path / "out", "blue", substrate=first.substrate)
    second = train(later)
    after = _files(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert second.run_file.name == "run-2.json"
    assert second.substrate == first.substrate
    digest = read_manifest(first.substrate).digest
    assert read_manifest(second.experts["blue"]).substrate_digest == digest
    with pytest.raises(ConfigError, match="output already"):
        train(later)
    assert _files(tmp_path / "out") == after


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    world: World, tmp_path: Path
) -> None:
    def weights(folder: str, seed: int) -> bytes:
        result = train(_quick(world, tmp_path / folder, "red", seed=seed))
        return (result.experts["red"] / "weights.safetensors").read_bytes()

    first = weights("a", 0)
    assert weights("b", 0) == first
    assert weights("c", 1) != first


def test_substrate_fixes_the_method(world: World, trained: TrainResult, tmp_path: Path) -> None:
    settings = _quick(world, tmp_path, "red", substrate=trained.substrate, alter={"rank": 2})
    with pytest.raises(ConfigError, match="rank"):
        train(settings)


@pytest.mark.parametrize("name", ["Red", "substrate", "a_b", "", "x" * 64, "a/b"])
def test_domain_names_that_no_server_would_take_are_refused(
    world: World, tmp_path: Path, name: str
) -> None:
    settings = _quick(world, tmp_path, "red")
    with pytest.raises(DomainNameError):
        train(dataclasses.replace(settings, forget={name: world.files["red"]}))


def test_rows_shared_by_two_sets_are_refused_before_anything_is_written(
    world: World, tmp_path: Path
) -> None:
    settings = _quick(world, tmp_path / "out", "red")
    overlap = dataclasses.replace(settings, general=(world.files["red"],))
    with pytest.raises(TrainingDataError, match=r"red.jsonl line 1 \(forget/red\)"):
        train(overlap)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"forget": {}}, ConfigError),
        ({"auto_domains": 99}, ConfigError),
        ({"auto_domains": -1}, ConfigError),
        ({"device": "tpu"}, ConfigError),
        ({"alter": {"tap_layer": 3}}, AlterError),
        ({"alter": {"tsallis_q": 2.0}}, ConfigError),
        ({"substrate": Path("nowhere")}, BundleError),
        ({"model": Path("nowhere")}, AlterError),
    ],
)
def test_impossible_settings_are_refused_by_name(
    world: World, tmp_path: Path, changes: dict[str, object], error: type[AlterError]
) -> None:
    with pytest.raises(error):
        train(dataclasses.replace(_quick(world, tmp_path / "out", "red"), **changes))  # type: ignore[arg-type]


def test_structural_weight_without_a_gradient_on_a_is_refused() -> None:
    with pytest.raises(ConfigError, match="structure_weight"):
        SubstrateSettings(structure_weight=0.01)


def test_unknown_entropy_mask_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="entropy_mask is unknown") as refused:
        ExpertSettings(entropy_mask="attention")  # type: ignore[arg-type]
    offered = {mask.value for mask in EntropyMask}
    assert set(str(refused.value.expected).split(" or ")) == offered
    assert {ExpertSettings(entropy_mask=mask).entropy_mask for mask in offered} == offered


def test_one_file_is_cut_into_domains(world: World, tmp_path: Path) -> None:
    settings = _quick(world, tmp_path / "out", "red", auto_domains=2)
    result = train(settings)
    assert list(result.experts) == ["red-1", "red-2"]
    assert all(read_manifest(path).name == name for name, path in result.experts.items())


def test_shared_part_can_be_learned_before_the_experts(world: World, tmp_path: Path) -> None:
    settings = _quick(
        world,
        tmp_path / "out",
        "red",
        alter={"retain_expert": "trained", "rank": 4},
        substrate_settings=SubstrateSettings(
            a_gradient="high_entropy", structure_weight=0.01, joint_steps=3
        ),
    )
    result = train(settings)
    tensors = read_bundle(result.substrate, "substrate").tensors
    assert any(bool(t.any()) for name, t in tensors.items() if "retain.lora_b" in name)
    assert result.evaluation["substrate"]["joint"].keys() == {
        "forget",
        "retain",
        "high_entropy",
        "structure",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"alter": {"entropy_source": "two_pass"}},
        {"alter": {"router": "scalar"}},
        {"alter": {"target_modules": ("qkv", "o")}},
        {"mixed_precision": "bf16"},
    ],
)
def test_every_reading_of_the_method_trains(
    world: World, tmp_path: Path, changes: dict[str, object]
) -> None:
    if changes.get("alter") == {"router": "scalar"}:
        # It routes all tokens or none; which of the two is not for this test to say.
        with contextlib.suppress(TrainingError):
            train(_quick(world, tmp_path / "out", "red", **changes))
        return
    assert train(_quick(world, tmp_path / "out", "red", **changes)).experts["red"].is_dir()


def test_command_line_trains_and_names_what_it_made(world: World, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train_command)
    out = tmp_path / "out"
    arguments = ["--out", out, "--forget", f"red={world.files['red']}"]
    arguments += ["--epochs", 1, "--min-steps", 3, "--entropy-mask", "atwu"]
    arguments += ["--retain", world.files["retain"], "--general", world.files["general"]]
    arguments += ["--evaluation-rows", 0, "--rank", 4, "--target-modules", "qkv,down"]
    arguments += ["--router", "evidence", "--device", "cpu", "--no-rewritten-dates"]
    result = CliRunner().invoke(app, [str(world.model), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert f"red\t{out / 'red'}" in result.stdout
    recorded = read_manifest(out / "red").training.settings
    assert recorded["evidence.rewritten_dates"] is False
    assert recorded["expert.entropy_mask"] == "atwu"
    config = read_manifest(out / "substrate").config
    assert (config.rank, config.lora_alpha) == (4, 8)
    assert config.target_modules == ("qkv", "down")
    write_jsonl(tmp_path / "bad.jsonl", [])
    wrong = CliRunner().invoke(app, [str(world.model), *map(str, arguments), "--forget", "blue"])
    assert isinstance(wrong.exception, ConfigError)
