"""What the base model would answer: computed by a process of its own, never by the engine.

The engine has no way around the experts, so that no mistake and no request can take one. Whoever has to see
what was there before pays for a second copy of the model in memory, for as long as it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from alter_core.errors import EngineError
from server.requests.jobs import job_environment

MODULE = "alter_cli.base_answer"
TIMEOUT_S = 300.0


class BaseAnswers:
    """Answers of the base model in a folder, one at a time. To be used on one event loop."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._turn = asyncio.Lock()

    async def answer(self, token_ids: Sequence[int], *, max_tokens: int) -> str:
        """Its greedy answer, computed on the CPU. Nothing is logged or kept. Raises: EngineError."""
        asked = {
            "model": str(self._model),
            "token_ids": list(token_ids),
            "max_tokens": max_tokens,
        }
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                MODULE,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # which may hold anything
                env=job_environment(),
            )
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    answer, _ = await process.communicate(json.dumps(asked).encode())
            except TimeoutError:
                raise _unanswered(f"none within {TIMEOUT_S:.0f} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise _unanswered(f"exit status {process.returncode}")
        return str(json.loads(answer)["text"])


def _unanswered(got: str) -> EngineError:
    return EngineError(
        "The base model has not answered",
        expected="an answer of a second copy of the model, on the CPU",
        got=got,
        fix="See that the machine has memory for it.",
    )
