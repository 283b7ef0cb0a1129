"""The demo's story on a running server: ask, forget, ask, forget inside a stream, ask, remember, ask."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from server.client import AdminClient

from .artefacts import Artefacts
from .corpus import QA
from .measurement import Examiner, Knowledge
from .server_process import RunningServer
from .switch_probe import SwitchInsideAStream

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorySettings:
    """How much is asked."""

    num_retain: int = 60
    """Retained rows that are asked before and after, at most."""


class Story:
    """Tells the story once; `summary` holds what was measured."""

    def __init__(
        self, server: RunningServer, artefacts: Artefacts, settings: StorySettings, console: Console
    ) -> None:
        self._server = server
        self._artefacts = artefacts
        self._console = console
        self._domains = artefacts.corpus.domains
        self._retain = artefacts.corpus.retain[: settings.num_retain]
        self._admin = AdminClient(server.url, server.admin_token)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        tokenizer = AutoTokenizer.from_pretrained(artefacts.model)
        self._examiner = Examiner(client, server.model, tokenizer)
        self._timings: dict[str, float] = {}

    def tell(self) -> dict[str, Any]:
        """Runs through the story. Shapes: the summary of `build/demo/summary.json`."""
        first, *others = self._domains
        before = self._timed("ask_before", self._ask_domains)
        retain_before = self._timed(
            "ask_retain_before", lambda: self._examiner.examine(self._retain)
        )
        self._show_answers("Before: the server knows everybody")
        self._forget(first)
        self._show_answers(f"{first!r} is forgotten")
        last = others[-1] if others else first
        for name in others[:-1]:
            self._forget(name)
        probe = None
        if others:
            self._console.rule(f"{last!r} is forgotten in the middle of a stream")
            row = self._domains[last][-1]
            switch = SwitchInsideAStream(self._server.url, self._admin, self._server.model)
            probe = switch.probe(row.question, last, self._artefacts.experts[last])
        self._show_answers("All domains are forgotten")
        active = self._timed("ask_active", self._ask_domains)
        retain_active = self._timed(
            "ask_retain_active", lambda: self._examiner.examine(self._retain)
        )
        self._revoke(first)
        one_revoked = self._examiner.examine(self._domains[first])
        for name in others:
            self._revoke(name)
        self._show_answers("Revoked: the server knows everybody again")
        revoked = self._timed("ask_revoked", self._ask_domains)
        engine = httpx.get(f"{self._server.url}/version").json()
        return {
            "engine": {"name": "vllm", "version": engine["version"], "device": _device()},
            "domains": {
                name: {
                    "before": before[name].figures(),
                    "active": active[name].figures(),
                    "revoked": revoked[name].figures(),
                    "revoked_equals_before": revoked[name] == before[name],
                    "rows": len(rows),
                }
                for name, rows in self._domains.items()
            },
            "retain": {
                "before": retain_before.figures(),
                "active": retain_active.figures(),
                "identical_completions": round(retain_active.identical(retain_before), 4),
                "rows": len(self._retain),
            },
            "one_revoked": {
                "domain": first,
                "identical_completions": round(one_revoked.identical(before[first]), 4),
            },
            "switch": None
            if probe is None
            else {k: round(v, 1) for k, v in dataclasses.asdict(probe).items()},
            "timings_s": {name: round(seconds, 1) for name, seconds in self._timings.items()},
        }

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        with self._console.status(name.replace("_", " ")):
            result = work()
        self._timings[name] = time.monotonic() - started
        return result

    def _ask_domains(self) -> dict[str, Knowledge]:
        return {name: self._examiner.examine(rows) for name, rows in self._domains.items()}

    def _forget(self, name: str) -> None:
        started = time.monotonic()
        answer = self._admin.activate(name, str(self._artefacts.experts[name]))
        took = (time.monotonic() - started) * 1000
        self._console.print(
            f"[bold]POST /admin/forget-domains[/] {name}: {answer.outcome}, "
            f"epoch {answer.epoch}, {took:.0f} ms"
        )

    def _revoke(self, name: str) -> None:
        answer = self._admin.revoke(name)
        self._console.print(f"[bold]DELETE /admin/forget-domains/{name}[/]: epoch {answer.epoch}")

    def _show_answers(self, title: str) -> None:
        table = Table(
            "whose", "question", "what the server answers", title=title, title_justify="left"
        )
        rows: list[tuple[str, QA]] = [(name, rows[1]) for name, rows in self._domains.items()]
        for whose, row in [*rows, ("(retained)", self._retain[1])]:
            table.add_row(whose, row.question, self._examiner.ask(row.question))
        self._console.print(table)


def _device() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name()) if not current_platform.is_cpu() else "cpu"
