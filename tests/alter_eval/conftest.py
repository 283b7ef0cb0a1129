"""The small world's model as one that knows its rows, and another that knows nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from alter_core.rows import read_rows
from alter_eval import tofu
from alter_eval.models import TransformersModel
from tests.support.loopback import serving
from tests.trainer.world import World, make_model
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import encode_rows

from .small_tofu import SETS, rows_of_set, served_answer


@pytest.fixture(scope="session")
def exact_base(world: World) -> BaseModel:
    """In float32, where a batch gives what its rows give alone."""
    base = load_base_model(world.model, device="cpu")
    return dataclasses.replace(base, model=base.model.float())


@pytest.fixture(scope="session")
def ignorant_base(base: BaseModel) -> BaseModel:
    """Random weights."""
    model = make_model(len(base.tokenizer), seed=5).requires_grad_(False).eval()
    return dataclasses.replace(base, model=model)


def logs_of(base: BaseModel, world: World, judge: BaseModel) -> tofu.ModelLogs:
    holdout = encode_rows(read_rows([world.files["general"]]), base.tokenizer, max_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu, "_MAX_NEW_TOKENS", 24)
        model = TransformersModel(base)
        return tofu.ModelLogs(
            sets={
                name: tofu.evaluate_set(
                    model,
                    rows_of_set(name, 8 if name == "forget" else 4),
                    TransformersModel(judge) if name == "forget" else None,
                )
                for name in SETS
            },
            holdout=tofu.evaluate_holdout(model, holdout),
        )


@pytest.fixture(scope="session")
def knowing(base: BaseModel, world: World) -> tofu.ModelLogs:
    return logs_of(base, world, base)


@pytest.fixture(scope="session")
def ignorant(ignorant_base: BaseModel, base: BaseModel, world: World) -> tofu.ModelLogs:
    return logs_of(ignorant_base, world, base)


@dataclasses.dataclass
class FakeServer:
    """A server on loopback. Set `status` to make it refuse."""

    url: str
    asked: list[tuple[str, dict[str, Any], dict[str, str]]]
    """Path, body and headers of every request."""
    status: int = 200


@contextlib.contextmanager
def serve_fake(
    answer: Callable[[str, dict[str, Any]], dict[str, Any] | None],
) -> Iterator[FakeServer]:
    """Serves what `answer` makes of a path and a body; None is 404."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.asked.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
            found = answer(self.path, body)
            # A refusal that repeats what it was asked, as real ones do.
            content = json.dumps(found if fake.status == 200 else {"error": body}).encode()
            self.send_response(404 if found is None else fake.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            with contextlib.suppress(ConnectionError):  # who asked may be gone
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as url:
        fake = FakeServer(url=url, asked=[])
        yield fake


@pytest.fixture
def fake_server(exact_base: BaseModel) -> Iterator[FakeServer]:
    """A server in vLLM's manner, with the small world's model."""

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return served_answer(exact_base, body) if path == "/v1/completions" else None

    with serve_fake(answer) as fake:
        yield fake


@pytest.fixture
def server(fake_server: FakeServer) -> str:
    """Its root."""
    return fake_server.url
