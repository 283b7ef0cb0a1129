"""Refreshing experts of the small world whose heads were made to fire where they should not."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from alter_core.bundle import read_bundle, read_manifest
from alter_core.errors import AlterError, ConfigError, SubstrateMismatchError, TrainingError
from alter_core.rows import read_rows
from alter_core.substrate import ForgetExpert, Substrate
from tests.alter_core.crafted import num_hooks
from tests.support.tiny import PROVENANCE
from trainer import (
    EvidenceSettings,
    ExpertSettings,
    RefreshSettings,
    SilentReporter,
    TrainResult,
    refresh_experts,
    train,
)
from trainer.base_model import BaseModel
from trainer.cli import train_command
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import answer_losses, answer_states, attached_experts, mean, routed_logits
from trainer.recovery import (
    Recovery,
    answer_divergence,
    lowering,
    recover,
)
from trainer.substrate import normalised_embeddings

from .conftest import settings_for
from .world import World

ROOM = 0.5
Rows = dict[str, list[EncodedRow]]
Expert = Callable[..., ForgetExpert]


@pytest.fixture(scope="module")
def quick(world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """`red` and a substrate, trained just long enough to forget, and to fire on no row of `blue`."""
    settings = settings_for(
        world,
        tmp_path_factory.mktemp("quick") / "out",
        "red",
        general=(world.files["general"], world.files["blue"]),
        evidence_settings=EvidenceSettings(pointwise_steps=60, bag_steps=90),
        expert_settings=ExpertSettings(epochs=1, min_steps=40),
        evaluation_rows=0,
    )
    return train(settings)


@pytest.fixture(scope="module")
def substrate(quick: TrainResult, base: BaseModel) -> Substrate:
    return Substrate.read(quick.substrate, base.info)


@pytest.fixture(scope="module")
def rows(world: World, base: BaseModel) -> Rows:
    return {
        part: encode_rows(read_rows([path]), base.tokenizer, max_tokens=128)
        for part, path in world.files.items()
    }


@pytest.fixture(scope="module")
def red(quick: TrainResult, substrate: Substrate) -> ForgetExpert:
    return ForgetExpert.read(quick.experts["red"], substrate)


@pytest.fixture(scope="module")
def alarmed(red: ForgetExpert, base: BaseModel, substrate: Substrate, rows: Rows) -> ForgetExpert:
    """`red` with its bias raised until the first of the retained rows are routed to it."""
    highest = max(evidence_maxima(red, base, substrate, rows["retain"]))
    assert highest < 0
    return with_head(red, weight=1, bias_raised_by=0.1 - highest)


@pytest.fixture(scope="module")
def everywhere(red: ForgetExpert) -> ForgetExpert:
    """`red` with a head that fires on every token alike, so that no bias can set it right."""
    return with_head(red, weight=0, bias_raised_by=4)


def with_head(expert: ForgetExpert, *, weight: float, bias_raised_by: float) -> ForgetExpert:
    head = copy.deepcopy(expert.evidence)
    head.fc2.weight *= weight
    head.fc2.bias += bias_raised_by
    return dataclasses.replace(expert, evidence=head)


def evidence_maxima(
    expert: ForgetExpert, base: BaseModel, substrate: Substrate, rows: list[EncodedRow]
) -> list[float]:
    embeddings, ids = normalised_embeddings(base, substrate), [row.ids for row in rows]
    found = routed_logits(expert.evidence, embeddings, substrate.config, ids)
    return [logits.max().item() for logits in found]


def losses_under(
    expert: ForgetExpert | None, base: BaseModel, substrate: Substrate, rows: list[EncodedRow]
) -> list[float]:
    with attached_experts(base, substrate, [expert] if expert else []):
        return answer_losses(base, rows)


def recovered(
    expert: ForgetExpert, base: BaseModel, substrate: Substrate, rows: Rows, **changes: object
) -> Recovery | None:
    settings = RefreshSettings(
        model=Path(), out=Path(), substrate=Path(), experts={}, forget={}, retain=()
    )
    settings = dataclasses.replace(settings, **({"num_steps": 60} | changes))  # type: ignore[arg-type]
    with SilentReporter().stage("refresh", settings.num_steps) as stage:
        kept = {"retain": rows["retain"], "other_domains": rows["blue"]}
        return recover(base, substrate, expert, rows["red"], kept, settings, stage)


@pytest.mark.parametrize(
    ("prompts", "alarms", "expected"),
    [
        ([6.0, 8.0], [1.0, 2.0], 2.0 + ROOM),
        ([6.0, 6.0], [1.0, 2.9], 3.0),
        ([6.0, 6.0], [1.0, 3.5], 1.0 + ROOM),
        ([6.0, 6.0], [3.5, 9.0], 0.0),
        ([-1.0, -1.0], [0.5], 0.0),
    ],
    ids=["all", "up to half", "those within reach", "none within reach", "no room"],
)
def test_bias_is_lowered_by_what_silences_alarms_and_leaves_prompts_half_of_their_evidence(
    prompts: list[float], alarms: list[float], expected: float
) -> None:
    assert lowering(prompts, alarms) == pytest.approx(expected, abs=0.06)


def test_divergence_is_kl_and_distance_of_the_true_tokens_from_the_states_taken_before(
    base: BaseModel, substrate: Substrate, everywhere: ForgetExpert, rows: Rows
) -> None:
    texts, indices = rows["red"][:3], [2, 0]
    states = answer_states(base, texts)
    total, count = 0.0, 0
    with torch.no_grad(), attached_experts(base, substrate, [everywhere]) as attached:
        found = answer_divergence(base, texts, states, indices)
        for index in indices:
            ids = torch.tensor([texts[index].ids])
            now = base.model(input_ids=ids).logits[0].double().softmax(dim=-1)
            with attached.disabled():
                target = base.model(input_ids=ids).logits[0].double().softmax(dim=-1)
            for place, is_answer in enumerate(texts[index].is_answer[1:]):
                if is_answer:
                    p, q = target[place], now[place]
                    gap = abs((q / p)[texts[index].ids[place + 1]].log().item())
                    huber = gap**2 / 2 if gap < 1 else gap - 0.5
                    total, count = total + (p * (p / q).log()).sum().item() + huber, count + 1
    assert found.item() == pytest.approx(total / count, rel=0.03)  # bf16, batched and alone
    assert found.item() > 0.5


def test_false_alarms_that_the_gate_can_tell_are_silenced_and_b_stays_bit_for_bit(
    base: BaseModel, substrate: Substrate, alarmed: ForgetExpert, rows: Rows
) -> None:
    found = recovered(alarmed, base, substrate, rows)
    assert found is not None
    figures = found.figures["kept"]["retain"]
    is_alarm = [m > 0 for m in evidence_maxima(alarmed, base, substrate, rows["retain"])]
    assert figures["false_alarms"] == {"before": mean(is_alarm), "after": 0}
    assert figures["loss"]["after"] == figures["loss"]["base"] < figures["loss"]["before"]
    assert found.figures["num_steps"] == 0
    assert found.figures["forget_loss"]["after"] > 0.95 * found.figures["forget_loss"]["before"]
    for site, lora_b in alarmed.lora_b.items():
        assert torch.equal(found.expert.lora_b[site], lora_b)
    before_bias, after_bias = (e.evidence.fc2.bias.item() for e in (alarmed, found.expert))
    assert before_bias - after_bias == pytest.approx(found.figures["bias_lowered_by"], abs=1e-5)
    assert losses_under(found.expert, base, substrate, rows["retain"]) == losses_under(
        None, base, substrate, rows["retain"]
    )


def test_false_alarms_that_it_cannot_tell_are_trained_away_while_forgetting_holds(
    base: BaseModel, substrate: Substrate, everywhere: ForgetExpert, rows: Rows
) -> None:
    hooks, weight = num_hooks(base.model), base.model.lm_head.weight.clone()
    found = recovered(everywhere, base, substrate, rows)
    assert num_hooks(base.model) == hooks
    assert torch.equal(base.model.lm_head.weight, weight)
    assert found is not None
    assert found.figures["bias_lowered_by"] == 0
    assert found.figures["num_steps"] == 60
    for part, kind in (("retain", "retain"), ("blue", "other_domains")):
        figures = found.figures["kept"][kind]
        assert figures["num_rows"] == len(rows[part])
        assert figures["false_alarms"] == {"before": 1, "after": 1}
        losses = figures["loss"]
        for when, expert in {"base": None, "before": everywhere, "after": found.expert}.items():
            assert losses[when] == mean(losses_under(expert, base, substrate, rows[part]))
        assert losses["before"] - losses["base"] > 1
        assert losses["after"] - losses["base"] < 0.2 * (losses["before"] - losses["base"])
    forgotten = found.figures["forget_loss"]
    assert forgotten["after"] == mean(losses_under(found.expert, base, substrate, rows["red"]))
    assert forgotten["after"] > 0.95 * forgotten["before"]
    assert {tensor.dtype for tensor in found.expert.lora_b.values()} == {torch.bfloat16}


def test_forgetting_is_lost_without_what_holds_it_and_the_refresh_is_refused(
    base: BaseModel, substrate: Substrate, everywhere: ForgetExpert, rows: Rows
) -> None:
    with pytest.raises(TrainingError, match="would bring back") as refused:
        recovered(everywhere, base, substrate, rows, hold_weight=0.0, num_steps=30)
    assert "--refresh-tolerance" in str(refused.value)


def test_a_refresh_that_recovers_nothing_is_refused(
    base: BaseModel, substrate: Substrate, everywhere: ForgetExpert, rows: Rows
) -> None:
    with pytest.raises(TrainingError, match="recovers nothing"):
        recovered(everywhere, base, substrate, rows, learning_rate=1e-9, num_steps=1)


def test_an_expert_that_never_fires_on_kept_rows_has_nothing_to_refresh(
    base: BaseModel, substrate: Substrate, red: ForgetExpert, rows: Rows
) -> None:
    assert recovered(red, base, substrate, rows) is None


@dataclasses.dataclass(frozen=True)
class Shop:
    """Folders of experts, written as bundles on one substrate."""

    world: World
    substrate: Path
    experts: dict[str, Path]

    def settings(self, out: Path, *names: str, **changes: object) -> RefreshSettings:
        settings = RefreshSettings(
            model=self.world.model,
            out=out,
            substrate=self.substrate,
            experts={name: self.experts[name] for name in names},
            forget={name: self.world.files[name] for name in ("red", "blue")},
            retain=(self.world.files["retain"],),
            general=(self.world.files["general"],),
            evaluation_rows=0,
            device="cpu",
        )
        return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]

    def command(self, out: Path, *options: object) -> Result:
        arguments = [self.world.model, "--out", out, "--device", "cpu", "--evaluation-rows", 0]
        arguments += ["--forget", f"red={self.world.files['red']}"]
        arguments += ["--retain", self.world.files["retain"], *options]
        app = typer.Typer()
        app.command()(train_command)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shop(
    world: World,
    quick: TrainResult,
    substrate: Substrate,
    red: ForgetExpert,
    alarmed: ForgetExpert,
    everywhere: ForgetExpert,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shop:
    """`red` fires on some retained rows, `blue` on all text; `sound` is `red` as it was trained."""
    folder = tmp_path_factory.mktemp("shop")
    experts = {"red": alarmed, "blue": dataclasses.replace(everywhere, name="blue")}
    for name, expert in experts.items():
        expert.write(folder / name, substrate, training=PROVENANCE)
    folders = {name: folder / name for name in experts}
    return Shop(
        world=world, substrate=quick.substrate, experts={**folders, "sound": quick.experts["red"]}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_command_writes_a_new_bundle_that_names_the_old_and_tells_what_it_recovered(
    shop: Shop, base: BaseModel, substrate: Substrate, tmp_path: Path
) -> None:
    out, old = tmp_path / "out", shop.experts["red"]
    before = contents(old)
    options = ["--substrate", shop.substrate, "--refresh", f"red={old}", "--refresh-steps", 5]
    result = shop.command(out, *options)
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1] == f"red\t{out / 'red'}"
    assert [path.name for path in out.iterdir()] == ["red"]
    assert contents(old) == before
    bundle = read_bundle(out / "red", "forget-expert")
    training = bundle.manifest.training
    assert training.method == "alter-refresh"
    assert training.settings["refresh.of"] == read_manifest(old).digest
    assert training.settings["refresh.num_steps"] == 5
    assert training.data.keys() == {"forget/red", "retain"}
    assert ForgetExpert.read(out / "red", substrate).name == "red"
    assert bundle.evaluation is not None
    assert bundle.evaluation["router"]["false_alarms_retain"] == 0
    figures = bundle.evaluation["refresh"]
    told = " ".join(result.stderr.split())
    alarms = figures["kept"]["retain"]["false_alarms"]["before"]
    assert f"red: retain: false alarms {alarms:.1%} -> 0.0% of rows" in told
    loss = figures["forget_loss"]
    assert f"forget loss {loss['before']:.3f} -> {loss['after']:.3f}" in told
    written = b"".join(contents(out / "red").values()) + result.output.encode()
    assert not [text for text in shop.world.strings() if text.encode() in written]


def test_nothing_to_refresh_writes_nothing_and_names_the_bundle_that_is_there(
    shop: Shop, tmp_path: Path
) -> None:
    sound = shop.experts["sound"]
    result = shop.command(
        tmp_path / "out", "--substrate", shop.substrate, "--refresh", f"red={sound}"
    )
    assert result.exit_code == 0, result.exception
    assert result.stdout.splitlines()[-1] == f"red\t{sound}"
    assert "nothing to refresh" in result.stderr
    assert not (tmp_path / "out").exists()


def test_kept_rows_are_retained_general_and_other_domains(shop: Shop, tmp_path: Path) -> None:
    result = refresh_experts(shop.settings(tmp_path, "blue", num_steps=40, tolerance=0.5))
    figures = result.figures["blue"]
    assert figures is not None
    num_rows = {kind: found["num_rows"] for kind, found in figures["kept"].items()}
    assert num_rows == {"retain": 16, "other_domains": 8, "general": 8}
    evaluation = json.loads((result.experts["blue"] / "evaluation.json").read_text("utf-8"))
    assert evaluation["refresh"] == figures
    assert evaluation["router"]["false_alarms_other_domains"] == 1


def test_one_expert_that_would_lose_its_forgetting_keeps_all_from_being_written(
    shop: Shop, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match="would bring back what the expert of domain 'blue'"):
        refresh_experts(shop.settings(out, "red", "blue", num_steps=20, hold_weight=0.0))
    assert not out.exists()


def test_an_expert_of_another_substrate_is_refused(
    shop: Shop, substrate: Substrate, red: ForgetExpert, tmp_path: Path
) -> None:
    other = substrate.write(tmp_path / "other", name="other", training=PROVENANCE)
    red.write(tmp_path / "red", other, training=PROVENANCE)
    with pytest.raises(SubstrateMismatchError):
        refresh_experts(shop.settings(tmp_path / "out", experts={"red": tmp_path / "red"}))


def test_a_router_without_evidence_is_refused(
    shop: Shop, substrate: Substrate, red: ForgetExpert, tmp_path: Path
) -> None:
    config = dataclasses.replace(substrate.config, router="scalar")
    scalar = dataclasses.replace(substrate, config=config)
    scalar = scalar.write(tmp_path / "scalar", name="scalar", training=PROVENANCE)
    red.write(tmp_path / "red", scalar, training=PROVENANCE)
    settings = shop.settings(
        tmp_path / "out", substrate=tmp_path / "scalar", experts={"red": tmp_path / "red"}
    )
    with pytest.raises(ConfigError, match="evidence router"):
        refresh_experts(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {}}, "nothing to refresh"),
        ({"forget": {}}, "the domain's own rows"),
        ({"num_steps": 0}, "num_steps is out of range"),
        ({"tolerance": 1.0}, "tolerance is out of range"),
        ({"hold_weight": -1.0}, "hold_weight is out of range"),
    ],
)
def test_impossible_settings_are_refused(
    shop: Shop, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refresh_experts(shop.settings(tmp_path / "out", "red", **changes))
    assert not (tmp_path / "out").exists()


def test_a_bundle_under_another_name_or_in_the_way_is_refused(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another domain's"):
        refresh_experts(shop.settings(tmp_path, experts={"red": shop.experts["blue"]}))
    (tmp_path / "red").mkdir()
    with pytest.raises(ConfigError, match="output already"):
        refresh_experts(shop.settings(tmp_path, "red"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refresh", "red={red}"], "--substrate beside --refresh"),
        (["--refresh", "red={red}", "--substrate", "x", "--epochs", "3"], "got --epochs"),
        (["--refresh", "red={red}", "--substrate", "x", "--resume"], "got --resume"),
        (["--refresh-steps", "3"], "--refresh NAME=DIR beside them"),
        (["--refresh", "red"], "--refresh is malformed"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    shop: Shop, tmp_path: Path, options: list[str], message: str
) -> None:
    filled = [option.format(**shop.experts) for option in options]
    if message == "--refresh is malformed":
        filled += ["--substrate", str(shop.substrate)]
    result = shop.command(tmp_path / "out", *filled)
    assert isinstance(result.exception, AlterError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
