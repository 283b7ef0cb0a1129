"""JSON logs: one object per line, with what a record belongs to, from every process of a server."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import ConfigError
from server.logs import CONFIG_PATH, JsonFormatter, JsonLogs, log_context, logging_config


@pytest.fixture
def lines() -> Iterator[Any]:
    """Logs through the formatter; call it for the objects so far."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("test.json")
    logger.addHandler(handler)
    logger.setLevel("INFO")
    logger.propagate = False
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)


LOGGER = logging.getLogger("test.json")


def test_a_record_is_one_object_on_one_line(lines: Any) -> None:
    LOGGER.warning("two\nlines of %s", "text")
    [record] = lines()
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "WARNING",
        "logger": "test.json",
        "message": "two\nlines of text",
        "process": "MainProcess",
        "pid": os.getpid(),
    }


def test_a_context_names_request_and_epoch_in_its_tasks_and_threads_too(lines: Any) -> None:
    async def work(request_id: str, epoch: int) -> None:
        with log_context(request_id=request_id, epoch=epoch):
            await asyncio.sleep(0)
            await asyncio.gather(
                asyncio.create_task(inner()), asyncio.to_thread(LOGGER.info, "thread")
            )

    async def inner() -> None:
        LOGGER.info("task")

    async def run() -> None:
        await asyncio.gather(work("a", 3), work("b", 4))
        LOGGER.info("outside")

    asyncio.run(run())
    told = sorted((r.get("request_id", ""), r.get("epoch", 0), r["message"]) for r in lines())
    assert told == [
        ("", 0, "outside"),
        ("a", 3, "task"),
        ("a", 3, "thread"),
        ("b", 4, "task"),
        ("b", 4, "thread"),
    ]


def test_a_record_knows_better_than_its_context(lines: Any) -> None:
    with log_context(request_id="a", epoch=3):
        LOGGER.info("later", extra={"epoch": 0})
    assert (lines()[0]["request_id"], lines()[0]["epoch"]) == ("a", 0)


def test_attributes_of_others_are_left_out_and_tracebacks_stay(lines: Any) -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        LOGGER.exception("failed", extra={"prompt": "what is to be forgotten"})
    [record] = lines()
    assert "forgotten" not in json.dumps(record)
    assert record["exc_info"].endswith("ValueError: wrong")


def test_a_dict_is_a_message(lines: Any) -> None:
    LOGGER.info({"level": "mine"})
    assert (lines()[0]["level"], lines()[0]["message"]) == ("INFO", {"level": "mine"})


def parsed(**given: Any) -> Namespace:
    return Namespace(**({"disable_access_log_for_endpoints": None} | given))


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Leaves the logging of the test run alone; what would have been applied."""
    for name in (CONFIG_PATH, "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what `begin` sets is taken back
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    applied: list[dict[str, Any]] = []
    monkeypatch.setattr(logging.config, "dictConfig", applied.append)
    return applied


def test_flags_of_vllm_decide_level_and_left_out_requests(unconfigured: list[Any]) -> None:
    logs = JsonLogs.begin()
    assert os.environ[CONFIG_PATH] == str(logs.path)
    logs.follow(
        parsed(log_level="DEBUG", disable_access_log_for_endpoints="/metrics, /health/ready")
    )
    first, second = unconfigured
    assert json.loads(logs.path.read_text()) == second
    assert [config["loggers"]["vllm"]["level"] for config in (first, second)] == ["INFO", "DEBUG"]
    assert second["filters"]["excluded"]["excluded_paths"] == ["/metrics", "/health/ready"]
    assert second["loggers"]["uvicorn.access"]["filters"] == ["excluded"]
    logs.follow(parsed(logging_config=Namespace(
        log_level="ERROR", pylogging_config_file=str(logs.path), configure_logging=True
    )))  # fmt: skip
    assert unconfigured[2]["loggers"]["server"]["level"] == "ERROR"
    assert "filters" not in unconfigured[2]


@pytest.mark.parametrize(
    ("name", "value"), [(CONFIG_PATH, "/own.json"), ("VLLM_CONFIGURE_LOGGING", "0")]
)
def test_a_configuration_in_the_environment_is_not_overridden(
    unconfigured: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Two logging configurations"):
        JsonLogs.begin()
    assert unconfigured == []


@pytest.mark.parametrize(
    "given",
    [
        {"log_config_file": "/own.json"},
        {"logging_config": Namespace(pylogging_config_file="/own.json", configure_logging=True)},
        {"logging_config": Namespace(pylogging_config_file=None, configure_logging=False)},
    ],
)
def test_a_configuration_among_the_flags_is_not_overridden(
    unconfigured: list[Any], given: dict[str, Any]
) -> None:
    logs = JsonLogs.begin()
    with pytest.raises(ConfigError, match="Two logging configurations"):
        logs.follow(parsed(**given))


def test_a_level_that_logging_does_not_know_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CONFIG_PATH, "")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "LOUD")
    before = logging.getLogger("vllm").level
    with pytest.raises(ConfigError, match="LOUD") as caught:
        JsonLogs.begin()
    assert "VLLM_LOGGING_LEVEL" in str(caught.value.fix)
    assert logging.getLogger("vllm").level == before


ENGINE_PROCESS = """
import logging, sys
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger, set_vllm_process_name
configure_logging(LoggingConfig())  # as a process of the engine does
set_vllm_process_name("EngineCore")
init_logger("vllm.v1.engine").info("step %d", 7)
logging.getLogger("server.engine.worker").warning("ours")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4", "GET", "/metrics", "1", 200)
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "1.2.3.4", "GET", "/v1/models", "1", 200)
logging.getLogger("somebody.else").warning("else")
"""


def test_every_process_of_vllm_takes_the_file_over(tmp_path: Path) -> None:
    path = tmp_path / "logging.json"
    config = logging_config(level="INFO", stream="ext://sys.stdout", excluded_paths=["/metrics"])
    path.write_text(json.dumps(config))
    environment = os.environ | {CONFIG_PATH: str(path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", ENGINE_PROCESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    told = [(r["logger"], r["message"]) for r in records if r["process"] == "EngineCore"]
    assert told == [
        ("vllm.v1.engine", "step 7"),
        ("server.engine.worker", "ours"),
        ("uvicorn.access", '1.2.3.4 - "GET /v1/models HTTP/1" 200'),
        ("somebody.else", "else"),
    ]


SERVER = """
import asyncio, httpx, uvicorn
from fastapi import FastAPI
from server.api.app import attach
from server.logs import logging_config
app = FastAPI()
@app.get("/version")
async def version(): return {}
attach(app)
config = uvicorn.Config(
    app, port=0, log_config=logging_config(level="INFO", stream="ext://sys.stdout"), lifespan="off"
)
async def main():
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await client.get("/version", headers={"x-request-id": "case-5"})
        await client.post("/v1/completions", headers={"x-request-id": "case-6"})
        await client.get("/version")
    server.should_exit = True
    await serving
asyncio.run(main())
"""


def test_uvicorns_line_of_a_request_has_its_id() -> None:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SERVER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    access = [r for r in records if r["logger"] == "uvicorn.access"]
    assert [r["message"].split(" ", 2)[2] for r in access] == [
        '"GET /version HTTP/1.1" 200',
        '"POST /v1/completions HTTP/1.1" 503',
        '"GET /version HTTP/1.1" 200',
    ]
    assert [r["request_id"] for r in access[:2]] == ["case-5", "case-6"]
    assert len(access[2]["request_id"]) == 36
