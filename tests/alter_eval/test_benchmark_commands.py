"""The commands beside `alter eval tofu`, on small data in the formats of the benchmarks' publishers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from alter_core import AlterConfig
from alter_core.errors import ConfigError, EvaluationError
from alter_eval import fluency, muse, rwku
from alter_eval.cli import eval_app
from alter_eval.judge import PROMPT
from tests.support.tiny import PROVENANCE, random_expert, random_substrate
from tests.trainer.world import World

from .conftest import FakeServer, serve_fake
from .small_benchmarks import write_mmlu, write_muse, write_rwku, write_wmdp
from .test_judge import reply


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fluency, "_MAX_NEW_TOKENS", 4)
        patch.setattr(rwku, "_MAX_NEW_TOKENS", 12)
        patch.setattr(rwku, "_MAX_FLUENCY_TOKENS", 8)
        patch.setattr(muse, "_VERBATIM_TOKENS", 16)
        patch.setattr(muse, "_ANSWER_TOKENS", 12)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for write in (write_mmlu, write_wmdp, write_rwku, write_muse):
        write(folder)
    return folder


@pytest.fixture(scope="module")
def experts(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options that attach a random expert, which speaks up at most tokens."""
    folder = tmp_path_factory.mktemp("bundles")
    config = AlterConfig(tap_layer=1, rank=8, evidence_window=16)
    substrate = random_substrate(world.model, config).write(
        folder / "substrate", name="tiny", training=PROVENANCE
    )
    expert = random_expert(substrate, "red", seed=3, trigger_rate=0.9)
    expert.write(folder / "red", substrate, training=PROVENANCE)
    return ["--substrate", folder / "substrate", "--domain", f"red={folder / 'red'}"]


SETTINGS: dict[str, list[object]] = {
    "mmlu": ["--subjects", "anatomy,virology"],
    "wmdp": [],
    "rwku": [],
    "muse": ["--prefix-tokens", 25],
}
EXTRA = {"mmlu": "lm_eval", "wmdp": "lm_eval", "muse": "sacrebleu"}


def run(benchmark: str, world: World, data: Path, out: Path, *options: object) -> Result:
    if benchmark in EXTRA:
        pytest.importorskip(EXTRA[benchmark], reason="needs the extra `eval`")
    arguments = [benchmark, world.model, "--out", out, "--data", data, "--device", "cpu"]
    arguments += [*SETTINGS.get(benchmark, []), *options]
    return CliRunner().invoke(eval_app, [str(argument) for argument in arguments])


def figures_in(out: Path) -> dict[str, float | None]:
    figures: dict[str, float | None] = json.loads((out / "figures.json").read_text())
    return figures


def written(out: Path) -> str:
    return "".join(path.read_text() for path in out.iterdir())


@pytest.fixture(scope="module")
def plain(
    world: World, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The base model's evaluation by a benchmark, run once."""

    @functools.cache
    def evaluate(benchmark: str) -> Path:
        out = tmp_path_factory.mktemp(benchmark) / "out"
        result = run(benchmark, world, data, out, "--limit", 4)
        assert result.exit_code == 0, result.exception
        assert f"page: {out / 'report.md'}" in result.stdout
        assert not [text for text in world.strings() if text in result.stdout]
        return out

    return evaluate


@pytest.mark.parametrize("benchmark", SETTINGS)
def test_figures_and_a_page_are_written_and_no_text(
    world: World, plain: Callable[[str], Path], benchmark: str
) -> None:
    out = plain(benchmark)
    figures = figures_in(out)
    page = (out / "report.md").read_text()
    assert all(f"| `{name}` |" in page for name in figures)
    missing = {name for name, value in figures.items() if value is None}
    assert missing == ({"asg", "privleak"} if benchmark == "muse" else set())
    assert not [text for text in world.strings() if text in written(out)]
    key = json.loads((out / "run.json").read_text())
    assert key["benchmark"] == benchmark


@pytest.mark.parametrize("benchmark", ["rwku", "muse"])
def test_experts_change_what_is_found(
    world: World,
    data: Path,
    plain: Callable[[str], Path],
    experts: list[object],
    tmp_path: Path,
    benchmark: str,
) -> None:
    out = tmp_path / "out"
    result = run(benchmark, world, data, out, "--limit", 4, *experts)
    assert result.exit_code == 0, result.exception
    assert figures_in(out) != figures_in(plain(benchmark))
    assert list(json.loads((out / "run.json").read_text())["experts"]) == ["red"]


@pytest.mark.parametrize("benchmark", SETTINGS)
def test_a_server_of_the_same_model_has_the_same_figures(
    world: World,
    data: Path,
    plain: Callable[[str], Path],
    fake_server: FakeServer,
    tmp_path: Path,
    benchmark: str,
) -> None:
    options = ["--limit", 4, "--server", fake_server.url, "--served-model", "tiny"]
    result = run(benchmark, world, data, tmp_path / "out", *options)
    assert result.exit_code == 0, result.exception
    found, expected = figures_in(tmp_path / "out"), figures_in(plain(benchmark))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # float32 there, bf16 here: rarely, a token falls otherwise.
        tolerance = 0.6 if name == "ngram_entropy" else 0.05
        assert found[name] == (value if value is None else pytest.approx(value, abs=tolerance)), (
            name
        )
    assert {body["model"] for _, body, _ in fake_server.asked} == {"tiny"}


@pytest.mark.parametrize("benchmark", ["wmdp", "rwku"])
def test_a_finished_evaluation_is_gone_on_with_and_another_refused(
    world: World, data: Path, tmp_path: Path, benchmark: str
) -> None:
    out = tmp_path / "out"
    run(benchmark, world, data, out, "--limit", 3)
    names = {path.name for path in out.iterdir()} - {"figures.json", "report.md"}
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    assert run(benchmark, world, data, out, "--limit", 3).exit_code == 0
    assert before == {name: (out / name).stat().st_mtime_ns for name in names}
    result = run(benchmark, world, data, out, "--limit", 2)
    assert isinstance(result.exception, EvaluationError)
    assert "another evaluation" in str(result.exception)


def test_wmdp_subjects_and_mmlu_examples_can_be_chosen(
    world: World, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("wmdp", world, data, out, "--subjects", "bio, cyber").exit_code == 0
    assert "wmdp_chem_acc" not in figures_in(out)
    assert {"wmdp_bio_acc", "wmdp_cyber_acc"} <= figures_in(out).keys()
    assert run("mmlu", world, data, tmp_path / "shots", "--num-fewshot", 6).exit_code == 2
    result = run("mmlu", world, data, tmp_path / "shots", "--num-fewshot", 1)
    assert result.exit_code == 0, result.exception
    assert "1-shot" in (tmp_path / "shots" / "report.md").read_text()


def test_rwku_targets_are_chosen(world: World, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("rwku", world, data, out, "--target", "Ovid Krestmar").exit_code == 0
    assert len(json.loads((out / "forget_level1.json").read_text())["rouge_l"]) == 4
    result = run("rwku", world, data, tmp_path / "none", "--target", "Nobody")
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "none").exists()


def test_rwku_without_instructions_says_so(world: World, tmp_path: Path) -> None:
    data = write_rwku(tmp_path / "data", has_fluency=False)
    assert run("rwku", world, data, tmp_path / "out", "--limit", 2).exit_code == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| `ngram_entropy` | not told: fluency.jsonl is not in the data folder |" in page


def test_muse_is_compared_with_the_retrained_model(
    world: World, data: Path, experts: list[object], tmp_path: Path
) -> None:
    run("muse", world, data, tmp_path / "retrained", *experts)
    result = run("muse", world, data, tmp_path / "out", "--retrained", tmp_path / "retrained")
    assert result.exit_code == 0, result.exception
    figures = figures_in(tmp_path / "out")
    assert (figures["asg"] or 0) > 0.1, "the base model knows the texts by heart"
    assert figures["privleak"] is not None
    result = run("muse", world, data, tmp_path / "out", "--retrained", tmp_path / "nothing")
    assert isinstance(result.exception, EvaluationError)


@pytest.mark.parametrize("benchmark", [*SETTINGS, "fluency"])
def test_a_folder_without_the_benchmark_is_named_before_anything_is_written(
    world: World, tmp_path: Path, benchmark: str
) -> None:
    options = ["--judge-url", "http://127.0.0.1:9", "--judge-model", "j"]
    chosen = options if benchmark == "fluency" else []
    result = run(benchmark, world, tmp_path / "no-data", tmp_path / "out", *chosen)
    assert isinstance(result.exception, (ConfigError, EvaluationError))
    assert "no-data" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_unknown_benchmark_lists_the_known() -> None:
    result = CliRunner().invoke(eval_app, ["helm"])
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert "There is no benchmark 'helm'" in told
    assert "tofu, mmlu, wmdp, rwku, muse, fluency, interference" in told


@pytest.mark.parametrize("benchmark", ["rwku", "wmdp"])
def test_the_servers_key_comes_from_the_environment(
    world: World,
    data: Path,
    fake_server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    benchmark: str,
) -> None:
    monkeypatch.setenv("ALTER_API_KEY", "secret-key")
    options = ["--server", fake_server.url, "--limit", 2]
    result = run(benchmark, world, data, tmp_path / "out", *options)
    assert result.exit_code == 0, result.exception
    assert {headers["authorization"] for *_, headers in fake_server.asked} == {"Bearer secret-key"}
    assert "secret-key" not in written(tmp_path / "out") + result.output


@pytest.fixture
def judge() -> Iterator[FakeServer]:
    """Scores by the length of the answer."""

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        content = body["messages"][0]["content"]
        return reply(str(len(content) % 5 + 1)) if path == "/v1/chat/completions" else None

    with serve_fake(answer) as fake:
        yield fake


def judged(world: World, data: Path, out: Path, judge: FakeServer, *options: object) -> Result:
    arguments = ["--judge-url", f"{judge.url}/v1", "--judge-model", "judge-1", *options]
    return run("fluency", world, data, out, *arguments)


def test_fluency_is_judged_and_the_prompt_published(
    world: World, data: Path, judge: FakeServer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = judged(world, data, out, judge)
    assert result.exit_code == 0, result.exception
    figures = figures_in(out)
    assert 1 <= (figures["fluency_mean"] or 0) <= 5
    assert figures["judged_share"] == 1
    assert len(judge.asked) == 1 + 3 * 5, "a check, then three prompts with five answers"
    page = (out / "report.md").read_text()
    assert PROMPT in page
    assert "judge-1" in page
    again = judged(world, data, out, judge)
    assert again.exit_code == 0
    assert len(judge.asked) == 1 + 3 * 5, "what is scored is not asked anew"


def test_a_judge_that_is_down_leaves_its_reason_in_the_table_and_exits_with_1(
    world: World, data: Path, judge: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    out = tmp_path / "out"
    judge.status = 403
    result = judged(world, data, out, judge)
    assert result.exit_code == 1
    assert figures_in(out) == dict.fromkeys(fluency.FIGURES)
    told = " ".join(result.output.split()) + written(out)
    assert "not measured: The judge gives no score" in told
    assert "PermissionDeniedError 403" in (out / "report.md").read_text()
    assert "sk-secret" not in told
    judge.status = 200
    assert judged(world, data, out, judge).exit_code == 0, "a repeated command goes on"
    assert None not in figures_in(out).values()


def test_a_judge_that_is_down_changes_nothing_of_another_evaluation(
    world: World, data: Path, judge: FakeServer, plain: Callable[[str], Path]
) -> None:
    out = plain("rwku")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    judge.status = 401
    result = judged(world, data, out, judge)
    assert isinstance(result.exception, EvaluationError)
    assert "another evaluation" in str(result.exception)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_judge_that_goes_down_keeps_what_it_scored(
    world: World, judge: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fluency, "PART_PROMPTS", 2)
    data = write_rwku(tmp_path / "data")
    out = tmp_path / "out"
    evaluate = fluency.evaluate_prompts

    def then_down(*args: Any, **options: Any) -> fluency.ScoresLog:
        log = evaluate(*args, **options)
        judge.status = 401
        return log

    monkeypatch.setattr(fluency, "evaluate_prompts", then_down)
    assert judged(world, data, out, judge).exit_code == 1
    assert (out / "prompts-0000.json").exists()
    assert not (out / "prompts-0002.json").exists()


def test_other_prompts_can_be_judged(
    world: World, data: Path, judge: FakeServer, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "Name a river."}\n{"instruction": "Name a town."}\n')
    result = judged(world, data, tmp_path / "out", judge, "--prompts", prompts)
    assert result.exit_code == 0, result.exception
    assert len(judge.asked) == 1 + 2 * 5
    prompts.write_text('{"question": "Name a river."}\n')
    result = judged(world, data, tmp_path / "other", judge, "--prompts", prompts)
    assert isinstance(result.exception, EvaluationError)
    assert "prompts.jsonl line 1" in str(result.exception)
