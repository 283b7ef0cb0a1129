"""JSON logs: one object per line, for records of ALTER, vLLM, uvicorn and whatever else logs.

    time, level, logger, message, process, pid      always
    request_id, epoch                               where they are known
    exc_info, stack_info                            where there are any

vLLM configures logging in each of its processes, and uvicorn's, from one file that VLLM_LOGGING_CONFIG_PATH
names. `begin` writes such a file, so engine and workers follow without being told. Who has a file of his own
names `server.logs.JsonFormatter` in it, as the factory of a formatter.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import logging.config
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pythonjsonlogger.json import JsonFormatter as BaseJsonFormatter

from alter_core.errors import ConfigError

LogFormat = Literal["text", "json"]

CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"
_CONFIGURE = "VLLM_CONFIGURE_LOGGING"
_LEVEL = "VLLM_LOGGING_LEVEL"
_STREAM = "VLLM_LOGGING_STREAM"
_DEFAULT_STREAM = "ext://sys.stdout"

_OURS = ("server", "alter_core", "vllm")
_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogContext:
    """What records made in a context belong to."""

    request_id: str | None = None
    epoch: int | None = None


_current: ContextVar[LogContext | None] = ContextVar("alter_log_context", default=None)


@contextlib.contextmanager
def log_context(*, request_id: str | None, epoch: int | None) -> Iterator[None]:
    """Names the request and the epoch in every JSON record of this context, tasks that it starts included."""
    token = _current.set(LogContext(request_id=request_id, epoch=epoch))
    try:
        yield
    finally:
        _current.reset(token)


class JsonFormatter(BaseJsonFormatter):
    """Takes from a record what the module lists, and no further attributes: they may hold anything."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        """See the base class. A dict that was logged in place of a text is the message."""
        moment = datetime.fromtimestamp(record.created, tz=UTC)
        context = _current.get() or LogContext()
        log_data["time"] = moment.isoformat(timespec="microseconds")
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = record.msg if isinstance(record.msg, dict) else record.message
        log_data["process"] = getattr(record, "vllm_process_name", record.processName)
        log_data["pid"] = record.process
        for field in ("request_id", "epoch"):
            value = getattr(record, field, getattr(context, field))
            if value is not None:
                log_data[field] = value
        for field in ("exc_info", "stack_info"):
            if message_dict.get(field):
                log_data[field] = message_dict[field]


class JsonLogs:
    """The file that makes every process of one server log in JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def begin(cls) -> Self:
        """From here on this process logs in JSON, and so will those that vLLM starts. To be called before
        vLLM is imported, or its first lines would be text.

        Raises: ConfigError if the environment has a logging configuration of its own, or a bad level.
        """
        for name, is_other in (
            (CONFIG_PATH, bool(os.environ.get(CONFIG_PATH))),
            (_CONFIGURE, os.environ.get(_CONFIGURE, "1") == "0"),
        ):
            if is_other:
                raise _two_configurations(f"{name}={os.environ[name]}")
        handle, name = tempfile.mkstemp(prefix="alter-logging-", suffix=".json")
        os.close(handle)
        logs = cls(Path(name))
        atexit.register(logs.path.unlink, missing_ok=True)
        os.environ[CONFIG_PATH] = name
        logs.configure(level=_env_level(), stream=os.environ.get(_STREAM, _DEFAULT_STREAM))
        return logs

    def configure(self, *, level: str, stream: str, excluded_paths: Sequence[str] = ()) -> None:
        """Writes the file and applies it here. `excluded_paths`: requests that uvicorn does not log.

        Raises: ConfigError for a level or a stream that logging does not know.
        """
        config = logging_config(level=level, stream=stream, excluded_paths=excluded_paths)
        self.path.write_text(json.dumps(config, indent=2), "utf-8")
        try:
            logging.config.dictConfig(config)
        except ValueError as error:
            raise ConfigError(
                "Logging cannot be configured like this",
                expected="a level such as INFO, and a stream such as ext://sys.stdout",
                got=f"level {level}, stream {stream}",
                fix=f"Correct {_LEVEL}, {_STREAM} or --log-level.",
            ) from error

    def follow(self, args: Namespace) -> None:
        """Takes level and left-out requests from vLLM's parsed flags, before vLLM configures itself by them.

        Raises: ConfigError if they name another configuration.
        """
        given = getattr(args, "logging_config", None)
        path = getattr(args, "log_config_file", None) or (given and given.pylogging_config_file)
        if path not in (None, str(self.path)):
            raise _two_configurations(path)
        if given is not None and not given.configure_logging:
            raise _two_configurations("--logging-config.configure_logging false")
        level = getattr(args, "log_level", None) or (given and given.log_level) or _env_level()
        excluded = args.disable_access_log_for_endpoints or ""
        self.configure(
            level=level,
            stream=os.environ.get(_STREAM, _DEFAULT_STREAM),
            excluded_paths=[path.strip() for path in excluded.split(",") if path.strip()],
        )


def _env_level() -> str:
    return os.environ.get(_LEVEL, "INFO").upper()


def logging_config(
    *, level: str, stream: str, excluded_paths: Sequence[str] = ()
) -> dict[str, Any]:
    """A configuration for `logging.config.dictConfig`, as JSON can hold it. Loggers of others: warnings."""
    ours = {"handlers": ["json"], "level": level, "propagate": False}
    loggers = dict.fromkeys(_OURS, ours) | dict.fromkeys(_UVICORN, ours)
    config: dict[str, Any] = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "server.logs.JsonFormatter"}},
        "handlers": {
            "json": {"class": "logging.StreamHandler", "formatter": "json", "stream": stream}
        },
        "loggers": loggers,
        "root": {"handlers": ["json"], "level": "WARNING"},
    }
    if excluded_paths:
        excluded = {
            "()": "vllm.logging_utils.UvicornAccessLogFilter",
            "excluded_paths": list(excluded_paths),
        }
        config["filters"] = {"excluded": excluded}
        loggers["uvicorn.access"] = {**ours, "filters": ["excluded"]}
    return config


def _two_configurations(got: str) -> ConfigError:
    return ConfigError(
        "Two logging configurations are given",
        expected=f"a log format of json alone, or a configuration of one's own under {CONFIG_PATH}",
        got=got,
        fix="With a file of your own leave the log format at text, and name server.logs.JsonFormatter in it "
        "as the factory of a formatter.",
    )
