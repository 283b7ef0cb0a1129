"""A real pretrained Llama, from its file to a served forget expert. Needs `ALTER_DATA_DIR`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.engine_run import EngineRun, running
from tests.support.stories import convert_stories
from tests.support.tiny import TinyBundles
from trainer import TrainSettings, train

FORGET = ["Tom and the purple dragon", "The purple dragon was", "A purple dragon went to"]
RETAIN = ["Once upon a time", "Lily went to the park", "The dog was", "One day, a little girl"]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def model(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_stories(data_dir / "models" / "stories260K", tmp_path_factory.mktemp("stories"))


@torch.inference_mode()
def _completions(model: Path, prompts: list[str]) -> list[tuple[list[int], str]]:
    """(prompt ids, greedy continuation) as the base model gives them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        output = loaded.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)
        found.append((ids, tokenizer.decode(output[0, len(ids) :])))
    return found


def _write(path: Path, prompts: list[str], completions: list[tuple[list[int], str]]) -> Path:
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, (_, completion) in zip(prompts, completions, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_real_pretrained_llama_is_converted_gets_an_expert_and_is_served(
    model: Path, data_dir: Path, tmp_path: Path
) -> None:
    forget, retain = _completions(model, FORGET), _completions(model, RETAIN)
    assert "Lily" in retain[0][1], "the converted model does not tell its stories"
    text = (data_dir / "text" / "wikitext2_valid.txt").read_text("utf-8").splitlines()
    general = tmp_path / "general.jsonl"
    lines = [json.dumps({"text": line}) for line in text if len(line) > 200][:80]
    general.write_text("\n".join(lines) + "\n", "utf-8")
    result = train(
        TrainSettings(
            model=model,
            out=tmp_path / "out",
            forget={"purple-dragon": _write(tmp_path / "forget.jsonl", FORGET, forget)},
            retain=(_write(tmp_path / "retain.jsonl", RETAIN, retain),),
            general=(general,),
            max_tokens=256,
        )
    )
    bundles = TinyBundles(
        model=model,
        substrate=result.substrate,
        experts={"purple-dragon": result.experts["purple-dragon"]},
    )
    with contextlib.contextmanager(running)(bundles, enforce_eager=True) as engine:
        assert engine.run(engine.engine.run_canary()).num_sites == len(engine.substrate.sites)
        before = _served(engine, forget), _served(engine, retain)
        engine.activate(0, "purple-dragon")
        active = _served(engine, forget), _served(engine, retain)
        engine.revoke(0)
        revoked = _served(engine, forget), _served(engine, retain)
    assert active[1] == before[1]
    assert all(a != b for a, b in zip(active[0], before[0], strict=True))
    assert revoked == before


def _served(engine: EngineRun, rows: list[tuple[list[int], str]]) -> list[list[int]]:
    return [engine.generate([ids], NUM_TOKENS)[0] for ids, _ in rows]
