from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import EvaluationError
from benchmarks.results import keep
from benchmarks.serving import blocks
from benchmarks.serving.blocks import Block, BlockCache, blocks_of, measure_apart
from benchmarks.serving.processes import descendants, memory_bytes, tree_memory_bytes
from benchmarks.serving.settings import FULL, QUICK, BenchSettings, settings_of


def _never(*_: Any) -> dict[str, Any]:
    raise AssertionError("must not be measured")


BLOCK = Block(kind="scale", model="25m", measure=_never, has_server=False)


def test_every_block_of_the_full_run_has_a_name_of_its_own_the_headline_models_first() -> None:
    names = list(blocks_of(FULL))
    assert names[0] == "offline-150m"
    assert {"scale-150m", "n64-25m", "switch-150m", "activation-25m"} < set(names)
    assert {f"online_{kind}-150m" for kind in ("retain", "mixed", "forget")} < set(names)


def test_kept_result_is_taken_without_measuring(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, QUICK)
    assert cache.read(BLOCK) is None
    keep(cache.path(BLOCK), {"rates": {"base": 1.5}})
    assert measure_apart(BLOCK, cache, tmp_path, is_quick=True) == {"rates": {"base": 1.5}}
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_model_or_sources_have_results_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path(block: Block = BLOCK, rounds: int = QUICK.rounds) -> Path:
        return BlockCache(tmp_path, dataclasses.replace(QUICK, rounds=rounds)).path(block)

    before = path()
    assert path() == before
    assert path(rounds=9) != before
    assert path(dataclasses.replace(BLOCK, model="150m")) != before
    served = dataclasses.replace(BLOCK, has_server=True)
    served_before = path(served)
    assert served_before != before
    monkeypatch.setattr(blocks, "_measured_sources", lambda has_server: f"other {has_server}")
    assert path() != before
    assert path(served) != served_before


def test_results_of_an_engine_do_not_follow_from_the_server() -> None:
    of_engine, of_server = (blocks._measured_sources(has_server) for has_server in (False, True))
    for source in ("server/engine/gate.py", "benchmarks/serving/offline.py"):
        assert Path(source).read_text("utf-8") in of_engine
    for source in ("server/api/app.py", "benchmarks/serving/switch.py"):
        text = Path(source).read_text("utf-8")
        assert text in of_server
        assert text not in of_engine


def test_failed_process_is_reported_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho started with $*\necho and failed >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(EvaluationError, match="scale-25m was not measured") as raised:
        measure_apart(BLOCK, BlockCache(tmp_path, QUICK), tmp_path, is_quick=True)
    assert raised.value.got == "exit code 3"
    fix = str(raised.value.fix)
    assert "-m benchmarks.serving.block scale-25m" in fix
    assert fix.endswith("--quick\nand failed")


def test_result_file_is_json(tmp_path: Path) -> None:
    keep(tmp_path / "deep" / "result.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == {"a": [1, 2]}


def test_memory_of_a_process_tree_is_found_from_its_root() -> None:
    code = "import sys; block = bytearray(64 << 20); print(flush=True); sys.stdin.read()"
    inner = [sys.executable, "-c", code]
    outer = f"import subprocess; subprocess.run({inner!r})"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (child,) = descendants(process.pid)
        assert {process.pid, child} <= set(descendants(os.getpid()))
        assert memory_bytes(child) > 64 << 20 > memory_bytes(process.pid)
        assert tree_memory_bytes(process.pid) >= memory_bytes(child)
        process.communicate(timeout=30)
    assert memory_bytes(child) == 0


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_a_batch_is_decoded_in_whole_turns(settings: BenchSettings) -> None:
    for batch in settings.decode_repeats:
        num_steps, num_turns = settings.decode_turns(batch)
        assert num_turns > 0
        num_tokens = 1 + num_turns * (1 + num_steps)
        assert num_tokens <= settings.decode_tokens


def test_rounds_may_be_given() -> None:
    assert settings_of(is_quick=True, rounds=None) == QUICK
    assert settings_of(is_quick=False, rounds=7) == dataclasses.replace(FULL, rounds=7)
