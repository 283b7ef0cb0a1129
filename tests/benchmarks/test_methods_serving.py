from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from alter_eval.eco import EcoModel, Prompt
from benchmarks.methods import serving
from tests.trainer.world import World
from trainer.base_model import BaseModel, load_base_model

JOB = {
    "model": "m",
    "substrate": "s",
    "experts": ["a", "b"],
    "retain": [[1, 2], [3]],
    "forget": [[4, 5, 6]],
    "eco_strength": 2.5,
    "rounds": 3,
    "seed": 7,
}


class Clock:
    """Time that engines alone make pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclasses.dataclass
class FakeEngine:
    """Takes so long for a batch and so long for one prompt, and remembers what it was asked."""

    name: str
    clock: Clock
    batch_s: float
    request_s: float
    asked: list[tuple[str, list[Prompt]]]
    warm_up: int = 0
    """Calls that take a thousand times as long, at first."""

    def __call__(self, prompts: Sequence[Prompt]) -> None:
        self.asked.append((self.name, list(prompts)))
        seconds = self.request_s if len(prompts) == 1 else self.batch_s
        self.clock.now += seconds * (1000 if self.warm_up > 0 else 1)
        self.warm_up -= 1


def even(prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
    return np.array([prompt[0] % 2 == 0 for prompt in prompts])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(serving, "time", clock)
    return clock


@pytest.fixture
def eco_inputs(base: BaseModel) -> serving.EcoInputs:
    matrix = serving.embedding_matrix(base)
    return serving.EcoInputs(classifier=even, embeddings=matrix, strength=0.7, seed=3)


def test_a_job_file_becomes_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure_serving(**given: Any) -> serving.Measured:
        asked.update(given)
        return serving.Measured(
            figures={"f": 1.5}, spread={"f": (1.0, 2.0)}, start_s=4.0, rounds_s=5.0
        )

    monkeypatch.setattr(serving, "measure_serving", measure_serving)
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(json.dumps(JOB))
    serving.main([str(job), str(result)])
    paths = {"model": Path("m"), "substrate": Path("s"), "experts": [Path("a"), Path("b")]}
    assert asked == JOB | paths
    assert json.loads(result.read_text()) == {
        "figures": {"f": 1.5},
        "spread": {"f": [1.0, 2.0]},
        "start_s": 4.0,
        "rounds_s": 5.0,
    }


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"experts": []}, {"retain": []}, {"eco_strength": -1.0}, {"round": 3}],
)
def test_an_impossible_job_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        serving.Job.model_validate(JOB | wrong)


def test_ratios_are_of_the_base_in_the_same_traffic() -> None:
    figures = serving.round_figures(
        {"base": {"retain": 2.0, "forget": 4.0}, "eco": {"retain": 4.0, "forget": 5.0}},
        {"base": {"retain": 0.1, "forget": 0.2}, "eco": {"retain": 0.3, "forget": 0.2}},
    )
    expected = {
        "base_decode_tokens_per_s": 192.0,
        "base_decode_tokens_per_s_retain": 256.0,
        "base_decode_tokens_per_s_forget": 128.0,
        "base_latency_ms": 150.0,
        "base_latency_ms_retain": 100.0,
        "base_latency_ms_forget": 200.0,
        "eco_decode_tokens_per_s": 115.2,
        "eco_decode_tokens_per_s_retain": 128.0,
        "eco_decode_tokens_per_s_forget": 102.4,
        "eco_latency_ms": 250.0,
        "eco_latency_ms_retain": 300.0,
        "eco_latency_ms_forget": 200.0,
        "eco_decode_ratio": 0.65,
        "eco_decode_ratio_retain": 0.5,
        "eco_decode_ratio_forget": 0.8,
        "eco_latency_ratio": 2.0,
        "eco_latency_ratio_retain": 3.0,
        "eco_latency_ratio_forget": 1.0,
    }
    assert figures == pytest.approx(expected)


def test_a_summary_is_the_median_with_lowest_and_highest() -> None:
    medians, spread = serving.summary(
        [{"a": 3.0, "b": 1.0}, {"a": 9.0, "b": 1.5}, {"a": 4.0, "b": 8.0}]
    )
    assert medians == {"a": 4.0, "b": 1.5}
    assert spread == {"a": (3.0, 9.0), "b": (1.0, 8.0)}


def test_the_first_round_does_not_count(clock: Clock) -> None:
    num_calls = 2 * (serving.NUM_BATCHES + serving.NUM_REQUESTS)
    engines = {
        "base": FakeEngine("base", clock, 1.0, 0.25, []),
        "alter": FakeEngine("alter", clock, 2.0, 0.75, [], warm_up=num_calls),
    }
    traffic = {"retain": [[1], [2]], "forget": [[3]]}
    found = serving.measure_rounds(engines, traffic, rounds=2, seed=0)
    assert len(found) == 2
    for figures in found:
        assert figures["alter_decode_ratio"] == pytest.approx(0.5)
        assert figures["alter_latency_ratio_forget"] == pytest.approx(3.0)


def test_one_slow_answer_does_not_move_a_round(clock: Clock) -> None:
    engines = {
        "base": FakeEngine("base", clock, 1.0, 0.25, []),
        "alter": FakeEngine("alter", clock, 2.0, 0.75, [], warm_up=1),
    }
    (figures,) = serving.measure_rounds(engines, {"retain": [[1]]}, rounds=1, seed=0)
    assert figures["alter_decode_ratio"] == pytest.approx(0.5)


def test_engines_take_turns_at_the_same_prompts(clock: Clock) -> None:
    asked: list[tuple[str, list[Prompt]]] = []
    names = ["base", "lora", "eco"]
    engines = {name: FakeEngine(name, clock, 1.0, 1.0, asked) for name in names}
    prompts: list[Prompt] = [(number,) for number in range(40)]
    serving.measure_rounds(engines, {"retain": prompts}, rounds=1, seed=5)
    turns = [asked[start : start + len(names)] for start in range(0, len(asked), len(names))]
    assert len(turns) == 2 * (serving.NUM_BATCHES + serving.NUM_REQUESTS)
    for turn in turns:
        assert sorted(name for name, _ in turn) == sorted(names)
        assert len({tuple(batch) for _, batch in turn}) == 1
    assert {turn[0][0] for turn in turns} == set(names)
    sizes = [len(turn[0][1]) for turn in turns]
    one_round = [16] * serving.NUM_BATCHES + [1] * serving.NUM_REQUESTS
    assert sizes == one_round * 2
    first = turns[0][0][1] + turns[1][0][1]
    assert len(set(first)) == 32


def test_flagged_prompts_are_sent_as_embeddings_and_others_as_tokens(
    eco_inputs: serving.EcoInputs,
) -> None:
    flagged, passed = eco_inputs([(4, 5, 6), (7, 8)])
    assert set(flagged) == {"prompt_embeds"}
    assert dict(passed) == {"prompt_token_ids": [7, 8]}


def test_corrupted_embeddings_are_those_of_the_eco_model_to_the_bit(
    base: BaseModel, eco_inputs: serving.EcoInputs
) -> None:
    eco = EcoModel(base, even, strength=0.7, seed=3)
    embed = base.model.get_input_embeddings()
    prompts: list[Prompt] = [(4, 5, 6), (2, 9, 1, 4, 4)]
    for prompt in prompts:
        clean = embed(torch.tensor([list(prompt)]))[0]
        with eco._corrupted([prompt]):
            expected = embed(torch.tensor([list(prompt)]))[0]
        corrupted = eco_inputs.corrupted(prompt)
        assert torch.equal(corrupted, expected)
        assert corrupted.dtype == expected.dtype
        assert not torch.equal(corrupted, clean)
        assert torch.equal(embed(torch.tensor([list(prompt)]))[0], clean)


def test_an_adapter_is_written_and_the_model_left_as_it_was(world: World, tmp_path: Path) -> None:
    model = load_base_model(world.model, device="cpu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    folder = serving.write_adapter(model, tmp_path, seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert (folder / "adapter_model.safetensors").exists()
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
