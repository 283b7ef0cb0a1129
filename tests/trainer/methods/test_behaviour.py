"""What holds for every method, on the small world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from alter_core.errors import ConfigError, TrainingDataError, TrainingError
from alter_core.rows import data_digest, read_rows
from tests.trainer.world import World, write_jsonl
from trainer.methods import (
    ADAPTERS,
    METHOD_FILE,
    METHODS,
    AtwuWeighting,
    EntropyWeighting,
    LoraAdapter,
    Retaining,
    TokenMethod,
    make_method,
    unlearn,
)
from trainer.methods.fields import described

from .conftest import probability, settings_for

NAMES = list(METHODS)
PER_TOKEN = [name for name, kind in METHODS.items() if issubclass(kind, TokenMethod)]
WITHOUT_TOKENS = [name for name in NAMES if name not in PER_TOKEN]


def _weights(folder: Path) -> dict[str, Any]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def _changed(before: Path, after: Path) -> set[str]:
    old, new = _weights(before), _weights(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not old[name].equal(new[name])}


@pytest.mark.parametrize("name", NAMES)
def test_forgotten_answers_become_improbable(
    name: str, world: World, unlearned: dict[str, Path]
) -> None:
    before = probability(world, world.model, "red")
    assert before > 0.9
    assert probability(world, unlearned[name], "red") < before / 2


@pytest.mark.parametrize("name", ["grad_diff", "kl_min", "ihl", "npo_gd", "npo_kl"])
def test_a_loss_on_retained_rows_keeps_more_of_them_than_ascent_does(
    name: str, world: World, unlearned: dict[str, Path]
) -> None:
    assert probability(world, unlearned["grad_ascent"], "red") < 0.1
    assert probability(world, unlearned[name], "red") < 0.1
    lost = probability(world, unlearned["grad_ascent"], "retain")
    assert probability(world, unlearned[name], "retain") > lost + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_base_model_alone(
    name: str, world: World, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in world.model.iterdir()}
    hyper = {"epochs": 2} | ({"reinforce_epochs": 2} if name == "whp" else {})
    first, again = (
        unlearn(settings_for(world, tmp_path / out, name, hyper=hyper)) for out in ("a", "b")
    )
    assert not _changed(first, again)
    assert _changed(world.model, first)
    assert before == {path.name: path.read_bytes() for path in world.model.iterdir()}


@pytest.mark.parametrize("name", ["random_label", "idk_dpo", "rmu", "grad_ascent"])
def test_another_seed_gives_other_weights(name: str, world: World, tmp_path: Path) -> None:
    hyper = {"epochs": 2, "batch_rows": 3}
    first, other = (
        unlearn(settings_for(world, tmp_path / str(seed), name, hyper=hyper, seed=seed))
        for seed in (0, 1)
    )
    assert _changed(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_only_declared_parameters_change(
    name: str, world: World, unlearned: dict[str, Path]
) -> None:
    changed = _changed(world.model, unlearned[name])
    if name == "rmu":
        declared = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    elif METHODS[name].adapter_use == "required":
        declared = {key for key in _weights(world.model) if "_proj.weight" in key}
    else:
        declared = set(_weights(world.model))
    assert changed == declared


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_is_refused_and_leaves_nothing(
    name: str, world: World, tmp_path: Path
) -> None:
    settings = settings_for(world, tmp_path / "out", name, hyper={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match="finite"):
        unlearn(settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_record_tells_how_it_was_made_and_never_what(
    name: str, world: World, unlearned: dict[str, Path]
) -> None:
    text = (unlearned[name] / METHOD_FILE).read_text("utf-8")
    record = json.loads(text)
    assert record["method"] == name
    assert record["data"]["forget"] == data_digest(read_rows([world.files["red"]])).model_dump()
    assert ("retain" in record["data"]) == issubclass(METHODS[name], Retaining)
    assert record["settings"]["epochs"] == 12
    assert record["train_s"] > 0
    assert record["num_trained_parameters"] > 0
    assert record["num_steps"] == record["settings"]["epochs"], "8 rows in batches of 8"
    assert record["versions"]["peft"]
    assert not [told for told in world.strings() if told in text]


def test_texts_of_settings_are_written_as_digests() -> None:
    method = make_method("elm", expert_prompt="of Zofia", novice_prompt="of nobody")
    shown = json.dumps(described(method))
    assert "Zofia" not in shown
    other = make_method("elm", expert_prompt="of Ovid", novice_prompt="of nobody")
    assert shown != json.dumps(described(other))


@pytest.mark.parametrize("adapter", [*ADAPTERS.values(), LoraAdapter(a_rate_ratio=0.0)])
@pytest.mark.parametrize("name", ["ihl", "npo_gd"])
def test_losses_run_under_adapters(
    name: str, adapter: LoraAdapter, world: World, tmp_path: Path
) -> None:
    hyper = {"learning_rate": 1e-2}
    out = unlearn(settings_for(world, tmp_path / "out", name, adapter=adapter, hyper=hyper))
    assert probability(world, out, "red") < 0.5
    changed = _changed(world.model, out)
    assert changed == {key for key in _weights(world.model) if "_proj.weight" in key}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_token_losses_run_under_entropy_weighting(name: str, world: World, tmp_path: Path) -> None:
    hyper = {"epochs": 1} | ({"reinforce_epochs": 2} if name == "whp" else {})
    weighting = EntropyWeighting(threshold=0.05)
    uniform, weighted = (
        unlearn(settings_for(world, tmp_path / out, name, hyper=hyper, **changes))
        for out, changes in (("uniform", {}), ("entropy", {"weighting": weighting}))
    )
    assert _changed(uniform, weighted)
    record = json.loads((weighted / METHOD_FILE).read_text("utf-8"))
    assert record["weighting"]["threshold"] == 0.05


@pytest.mark.parametrize("name", WITHOUT_TOKENS)
def test_a_weighting_is_refused_without_a_loss_of_single_tokens(
    name: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no loss of single tokens"):
        settings_for(world, tmp_path / "out", name, weighting=EntropyWeighting())


@pytest.mark.parametrize("name", ["grad_ascent", "random_label", "whp"])
def test_a_learned_weighting_is_refused_without_retained_rows(
    name: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="conflict with retained rows"):
        settings_for(world, tmp_path / "out", name, weighting=AtwuWeighting())


@pytest.mark.parametrize("name", NAMES)
def test_retained_rows_are_asked_for_exactly_where_they_are_read(
    name: str, world: World, tmp_path: Path
) -> None:
    reads = issubclass(METHODS[name], Retaining)
    with pytest.raises(ConfigError, match="retained rows"):
        settings_for(
            world, tmp_path / "out", name, retain=() if reads else (world.files["retain"],)
        )


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        make_method("gradient_ascend")
    assert all(name in str(caught.value) for name in METHODS)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="grad_ascent has no such setting") as caught:
        make_method("grad_ascent", retain_weight=1.0)
    assert "retain_weight" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, {"learning_rate": 0.0}) for name in NAMES),
        ("grad_diff", {"retain_weight": 0.0}),
        ("npo", {"beta": 0.0}),
        ("simnpo", {"gamma": -0.1}),
        ("idk_dpo", {"refusals": ()}),
        ("rmu", {"num_trained_layers": 0}),
        ("elm", {"eta": 0.0}),
        ("elm", {"expert_prompt": "only one"}),
        ("whp", {"alpha": 0.0}),
        ("whp", {"weight_decay": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_method(name, **setting)


def test_adapters_are_refused_where_a_method_names_its_weights_and_required_where_it_is_low_rank(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        settings_for(world, tmp_path / "out", "rmu", adapter=LoraAdapter())
    with pytest.raises(ConfigError, match="low-rank"):
        settings_for(world, tmp_path / "out", "elm", adapter=None)


def test_a_layer_that_the_model_lacks_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 to 2"):
        unlearn(settings_for(world, tmp_path / "out", "rmu", hyper={"layer": 3}))


def test_output_is_never_overwritten(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output already"):
        unlearn(settings_for(world, tmp_path, "grad_ascent"))


def test_rows_in_both_sets_are_refused(world: World, tmp_path: Path) -> None:
    both = (world.files["retain"], world.files["red"])
    with pytest.raises(TrainingDataError, match="share rows"):
        unlearn(settings_for(world, tmp_path / "out", "grad_diff", retain=both))


def test_plain_text_cannot_be_refused(world: World, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Some text of a book."}])
    with pytest.raises(TrainingDataError, match="line 1: plain text"):
        unlearn(settings_for(world, tmp_path / "out", "idk_dpo", forget=(text,)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "idk_dpo"])
def test_plain_text_can_be_forgotten(name: str, world: World, tmp_path: Path) -> None:
    hyper = {"epochs": 5} | ({"reinforce_epochs": 2} if name == "whp" else {})
    forget = (world.files["general"],)
    out = unlearn(settings_for(world, tmp_path / "out", name, forget=forget, hyper=hyper))
    assert probability(world, out, "general") < probability(world, world.model, "general")
