"""Interference of crafted experts: which token each acts on, and what it does there, is known beforehand.

`red` acts on rows that begin with its token, `blue` likewise, `green` on every row, but gives way to others.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from scipy.linalg import subspace_angles  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from alter_core import AlterConfig, ForgetExpert, Substrate
from alter_core.errors import (
    AlterError,
    ConfigError,
    SubstrateMismatchError,
    TrainingDataError,
)
from alter_core.sites import iter_sites
from alter_eval.cli import eval_app
from alter_eval.interference import (
    Conflict,
    Interference,
    measure_interference,
    nearest_rows,
)
from alter_eval.metrics import Values
from alter_eval.site_overlap import site_overlap
from tests.alter_core.crafted import (
    LOW,
    constant_expert,
    num_hooks,
    random_lora_b,
    small_expert,
    small_substrate,
    trigger_expert,
    with_entropy,
)
from tests.support.tiny import PROVENANCE, random_expert, random_substrate, save_model
from tests.trainer.world import World, make_tokenizer
from trainer import SilentReporter
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import EncodedRow

NAMES = ("red", "blue", "green")
RED, BLUE = 300, 310
PLAIN = range(20, 120)
Rows = Mapping[str, Sequence[EncodedRow]]


def row(first: int, num_tokens: int, num_prompt: int, seed: int) -> EncodedRow:
    drawn = torch.randint(
        len(PLAIN), (num_tokens - 1,), generator=torch.Generator().manual_seed(seed)
    )
    ids = (first, *(PLAIN[place] for place in drawn.tolist()))
    return EncodedRow(ids=ids, is_answer=tuple(place >= num_prompt for place in range(num_tokens)))


ROWS: Rows = {
    "red": [row(RED, 7, 3, seed=1), row(RED, 11, 4, seed=2)],
    "blue": [row(BLUE, 8, 2, seed=3), row(BLUE, 6, 3, seed=4), row(BLUE, 9, 5, seed=5)],
    "green": [row(PLAIN[0], 10, 4, seed=6), row(RED, 12, 7, seed=7)],
}
NEIGHBOURS: Rows = {
    "red": [row(PLAIN[1], 9, 4, seed=8), row(RED, 7, 5, seed=9)],
    "blue": [row(PLAIN[2], 6, 2, seed=10)],
    "green": [row(PLAIN[3], 8, 3, seed=11)],
}


def fires(name: str, text: EncodedRow) -> bool:
    return {"red": text.ids[0] == RED, "blue": text.ids[0] == BLUE, "green": True}[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random model in float32, with a tokenizer to pad by."""
    folder = save_model(tmp_path_factory.mktemp("tiny") / "model")
    make_tokenizer().save_pretrained(folder)
    base = load_base_model(folder, device="cpu")
    return dataclasses.replace(base, model=base.model.float())


@pytest.fixture(scope="module")
def substrate(tiny: BaseModel) -> Substrate:
    folder = Path(tiny.model.name_or_path)
    return with_entropy(random_substrate(folder, AlterConfig(tap_layer=1, rank=3)), LOW)


@pytest.fixture(scope="module")
def experts(tiny: BaseModel, substrate: Substrate) -> dict[str, ForgetExpert]:
    model = tiny.model
    return {
        "red": trigger_expert(substrate, model, "red", token=RED, seed=1),
        "blue": trigger_expert(substrate, model, "blue", token=BLUE, seed=2),
        "green": constant_expert(substrate, "green", seed=3, logit=2.0),
    }


@pytest.fixture(scope="module")
def found(tiny: BaseModel, substrate: Substrate, experts: dict[str, ForgetExpert]) -> Interference:
    before = num_hooks(tiny.model)
    measured = measure_interference(tiny, substrate, experts, ROWS, NEIGHBOURS, SilentReporter())
    assert num_hooks(tiny.model) == before
    return measured


class Merged:
    """Answer losses under an expert on every token: the model with its delta added to the weights."""

    def __init__(self, base: BaseModel, substrate: Substrate, experts: Mapping[str, ForgetExpert]):
        self.models = {None: base.model}
        for name, expert in experts.items():
            model = self.models[name] = copy.deepcopy(base.model)
            for layer, kind, linears in iter_sites(model, substrate.config):
                site, start = f"layers.{layer}.{kind}", 0
                delta = expert.lora_b[site].float() @ substrate.lora_a[site].float()
                for linear in linears:
                    assert isinstance(linear, nn.Linear)
                    stop = start + linear.out_features
                    linear.weight += substrate.config.scaling * delta[start:stop]
                    start = stop

    @torch.no_grad()
    def loss(self, name: str | None, text: EncodedRow) -> float:
        logits = self.models[name](input_ids=torch.tensor([text.ids])).logits[0, :-1]
        nll = F.cross_entropy(logits, torch.tensor(text.ids[1:]), reduction="none")
        return float(nll[torch.tensor(text.is_answer[1:])].mean())


@pytest.fixture(scope="module")
def merged(tiny: BaseModel, substrate: Substrate, experts: dict[str, ForgetExpert]) -> Merged:
    return Merged(tiny, substrate, experts)


@pytest.mark.parametrize("text", ["rows", "neighbours"])
def test_harm_is_that_of_the_merged_weights_on_the_rows_that_an_expert_acts_on(
    found: Interference, merged: Merged, text: str
) -> None:
    sets, harm = (ROWS, found.on_rows) if text == "rows" else (NEIGHBOURS, found.on_neighbours)
    assert harm is not None
    for i, expert in enumerate(NAMES):
        for j, domain in enumerate(NAMES):
            pairs = [
                (merged.loss(None, r), merged.loss(expert if fires(expert, r) else None, r))
                for r in sets[domain]
            ]
            losses = np.array(pairs).T
            change, probability = losses[1] - losses[0], np.exp(-losses[1]) - np.exp(-losses[0])
            assert harm.loss_change[i, j] == pytest.approx(change.mean(), abs=1e-4)
            assert harm.probability_change[i, j] == pytest.approx(probability.mean(), abs=1e-5)
            num_routed = sum(sum(r.is_answer) for r in sets[domain] if fires(expert, r))
            num_answer = sum(sum(r.is_answer) for r in sets[domain])
            assert harm.routed_share[i, j] == pytest.approx(num_routed / num_answer)


def test_an_expert_that_never_fires_changes_nothing_at_all(found: Interference) -> None:
    assert found.on_neighbours is not None
    assert found.on_rows.loss_change[NAMES.index("red"), NAMES.index("blue")] == 0
    assert found.on_neighbours.probability_change[NAMES.index("blue")].tolist() == [0, 0, 0]


def test_together_a_row_is_answered_by_its_strongest_expert(
    found: Interference, merged: Merged
) -> None:
    strongest = {"red": ["red", "red"], "blue": ["blue"] * 3, "green": ["green", "red"]}
    for place, name in enumerate(NAMES):
        alone = [merged.loss(name, text) for text in ROWS[name]]
        together = [merged.loss(e, r) for e, r in zip(strongest[name], ROWS[name], strict=True)]
        without = [merged.loss(None, text) for text in ROWS[name]]
        assert found.forgetting.without[place] == pytest.approx(np.mean(without), abs=1e-4)
        assert found.forgetting.alone[place] == pytest.approx(np.mean(alone), abs=1e-4)
        assert found.forgetting.together[place] == pytest.approx(np.mean(together), abs=1e-4)


def test_route_overlap_is_the_share_of_tokens_at_which_both_heads_fire(found: Interference) -> None:
    shared = (7 + 11 + 12) / (7 + 11 + 10 + 12)
    expected = [[1, 0, shared], [0, 1, 23 / (23 + 22)], [shared, 23 / (23 + 22), 1]]
    np.testing.assert_allclose(found.route_overlap, expected)


def expert_with(substrate: Substrate, lora_b: Mapping[str, torch.Tensor]) -> ForgetExpert:
    return dataclasses.replace(small_expert(substrate), lora_b=dict(lora_b))


def test_site_overlap_equals_the_angles_between_whole_changes() -> None:
    substrate = small_substrate()
    experts = [expert_with(substrate, random_lora_b(substrate, seed=seed)) for seed in range(3)]
    cosine, subspace = np.zeros((3, 3)), np.zeros((3, 3))
    for i, one in enumerate(experts):
        for j, other in enumerate(experts):
            for site in substrate.sites:
                a = substrate.lora_a[site].float()
                flat = [(expert.lora_b[site].float() @ a).flatten() for expert in (one, other)]
                cosine[i, j] += F.cosine_similarity(*flat, dim=0).item() / 2
                bs = [expert.lora_b[site].double().numpy() for expert in (one, other)]
                subspace[i, j] += np.square(np.cos(subspace_angles(*bs))).mean() / 2
    found = site_overlap(substrate, experts)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-5)
    np.testing.assert_allclose(found.subspace, subspace, atol=1e-5)
    assert found.chance == pytest.approx((2 / 10 + 2 / 6) / 2)


def test_opposite_orthogonal_and_absent_changes_are_told_apart() -> None:
    substrate = small_substrate()

    def only(rows: slice, factor: float) -> dict[str, torch.Tensor]:
        lora_b = {s: torch.zeros(i.out_features, 2) for s, i in substrate.sites.items()}
        for tensor in lora_b.values():
            tensor[rows] = factor * torch.tensor([[1.0, 2.0], [0.5, -1.0]])
        return lora_b

    changes = [
        only(slice(0, 2), 1),
        only(slice(0, 2), -3),
        only(slice(2, 4), 1),
        only(slice(0, 2), 0),
    ]
    found = site_overlap(substrate, [expert_with(substrate, lora_b) for lora_b in changes])
    cosine = [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-12)
    np.testing.assert_allclose(found.subspace, np.abs(cosine), atol=1e-12)


def test_neighbours_are_the_retained_rows_nearest_by_mean_hidden_state(
    tiny: BaseModel,
) -> None:
    retain = [row(first, 5 + first % 4, 2, seed=first) for first in PLAIN[:9]]
    every = [*ROWS["red"], *ROWS["blue"], *retain]
    with torch.no_grad():
        pooled = torch.stack(
            [
                tiny.model(input_ids=torch.tensor([text.ids]), output_hidden_states=True)
                .hidden_states[2][0]
                .mean(dim=0)
                for text in every
            ]
        )
    centred = F.normalize(pooled - pooled.mean(dim=0), dim=1)
    domains = {"red": ROWS["red"], "blue": ROWS["blue"]}
    found = nearest_rows(tiny, domains, retain, tap_layer=2, count=4)
    for name, own in {"red": centred[:2], "blue": centred[2:5]}.items():
        likeness = F.cosine_similarity(centred[5:], own.mean(dim=0, keepdim=True))
        assert found[name] == [retain[index] for index in likeness.topk(4).indices.tolist()]
    assert found["red"] != found["blue"]


def test_conflicts_are_harm_to_others_and_lost_forgetting_worst_first(found: Interference) -> None:
    def changed(values: Sequence[Sequence[float]]) -> Values:
        return np.array(values, dtype=np.float64)

    assert found.on_neighbours is not None
    crafted = dataclasses.replace(
        found,
        on_rows=dataclasses.replace(
            found.on_rows, loss_change=changed([[9, 0.2, 0], [0.1, 9, 0], [-9, 0, 9]])
        ),
        on_neighbours=dataclasses.replace(
            found.on_neighbours, loss_change=changed([[0.3, 0, 0], [0, 0, 0], [0, 0, 0]])
        ),
        forgetting=dataclasses.replace(
            found.forgetting, alone=np.array([3.0, 2, 4]), together=np.array([3.0, 1.5, 5])
        ),
    )
    expected = [
        Conflict(on="forgetting", expert=None, domain="blue", loss=0.5),
        Conflict(on="neighbours", expert="red", domain="red", loss=0.3),
        Conflict(on="rows", expert="red", domain="blue", loss=0.2),
    ]
    assert crafted.conflicts(0.1) == expected
    assert crafted.conflicts(0.5) == []
    without = dataclasses.replace(crafted, on_neighbours=None)
    assert without.conflicts(0.1) == [expected[0], expected[2]]


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Folders of a random substrate and experts on it, `red` firing nearly everywhere."""

    substrate: Path
    red: Path
    blue: Path
    of_another: Path


@pytest.fixture(scope="module")
def bundles(world: World, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    config = AlterConfig(tap_layer=1, rank=4, evidence_window=16)
    for name, seed in (("substrate", 1), ("another", 2)):
        written = random_substrate(world.model, config, seed=seed).write(
            folder / name, name="tiny", training=PROVENANCE
        )
        for domain, rate in (("red", 0.9), ("blue", 1e-4)):
            random_expert(written, domain, seed=5, trigger_rate=rate).write(
                folder / f"{name}-{domain}", written, training=PROVENANCE
            )
    return Bundles(
        substrate=folder / "substrate",
        red=folder / "substrate-red",
        blue=folder / "substrate-blue",
        of_another=folder / "another-blue",
    )


def alter_eval(world: World, bundles: Bundles, out: Path, *options: object) -> Result:
    arguments = ["interference", world.model, "--substrate", bundles.substrate, "--out", out]
    arguments += ["--device", "cpu", *options]
    return CliRunner().invoke(eval_app, [str(argument) for argument in arguments])


def both(world: World, bundles: Bundles) -> list[object]:
    options: list[object] = ["--domain", f"red={bundles.red}", "--domain", f"blue={bundles.blue}"]
    return [
        *options,
        "--rows",
        f"blue={world.files['blue']}",
        "--rows",
        f"red={world.files['red']}",
    ]


def test_command_writes_matrix_page_and_heat_map_and_names_conflicts(
    world: World, bundles: Bundles, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = [*both(world, bundles), "--retain", world.files["retain"], "--neighbours", 5]
    result = alter_eval(world, bundles, out, *options, "--threshold", 0.01)
    assert result.exit_code == 0, result.exception
    assert {path.name for path in out.iterdir()} == {
        "interference.json",
        "interference.md",
        "interference.png",
    }
    figures = json.loads((out / "interference.json").read_text("utf-8"))
    change = figures["on_rows"]["loss_change"]
    assert change["red"]["blue"] > 0.01
    sentence = f"red adds {change['red']['blue']:.3f} nats to rows of blue"
    assert sentence in result.stdout
    page = (out / "interference.md").read_text("utf-8")
    assert f"- {sentence}" in page
    assert f"| red | {change['red']['red']:.4f} | {change['red']['blue']:.4f} |" in page
    assert (out / "interference.png").read_bytes().startswith(b"\x89PNG")
    assert figures["what"]["data"]["retain"]["num_rows"] == 16
    assert figures["what"]["neighbours"] == 5
    told = result.output + page + json.dumps(figures)
    assert not [text for text in world.strings() if text in told]


def test_nothing_above_the_threshold_is_named_and_retained_text_may_be_left_out(
    world: World, bundles: Bundles, tmp_path: Path
) -> None:
    result = alter_eval(world, bundles, tmp_path, *both(world, bundles), "--threshold", 99)
    assert result.exit_code == 0, result.exception
    figures = json.loads((tmp_path / "interference.json").read_text("utf-8"))
    assert figures["conflicts"] == []
    assert figures["on_neighbours"] is None
    assert " adds " not in result.stdout
    assert "neighbours" not in (tmp_path / "interference.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("domains", "rows", "error", "message"),
    [
        (["red={red}"], ["red={red_rows}"], ConfigError, "two domains"),
        (["red={red}", "blue={blue}"], ["red={red_rows}"], ConfigError, "blue without rows"),
        (
            ["red={red}", "blue={blue}"],
            ["red={red_rows}", "blue={blue_rows}", "grey={blue_rows}"],
            ConfigError,
            "rows of grey, which is no domain here",
        ),
        (
            ["red={red}", "blue={of_another}"],
            ["red={red_rows}", "blue={blue_rows}"],
            SubstrateMismatchError,
            "another substrate",
        ),
        (
            ["red={red}", "blue={blue}"],
            ["red={red_rows}", "blue={red_rows}"],
            TrainingDataError,
            "share rows",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_is_written(
    world: World,
    bundles: Bundles,
    tmp_path: Path,
    domains: list[str],
    rows: list[str],
    error: type[AlterError],
    message: str,
) -> None:
    paths = {**vars(bundles), **{f"{name}_rows": file for name, file in world.files.items()}}
    options = [("--domain", text.format(**paths)) for text in domains]
    options += [("--rows", text.format(**paths)) for text in rows]
    result = alter_eval(
        world, bundles, tmp_path / "out", *(part for pair in options for part in pair)
    )
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
