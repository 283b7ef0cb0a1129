"""Has vLLM's engine write a text, beside the requests of clients."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from vllm import SamplingParams, TokensPrompt
from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind

from alter_core.errors import EngineError

from .base import Message, Prompts


class VllmWriter:
    """See `Writer`. Nothing is logged."""

    def __init__(self, client: EngineClient, prompts: Prompts) -> None:
        self._client = client
        self._prompts = prompts

    async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
        """See `Writer.write`."""
        tokens = await self._prompts.read(prompt)
        room = self._client.model_config.max_model_len - len(tokens)
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max(1, min(max_tokens, room)),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = TokensPrompt(prompt_token_ids=[token.token_id for token in tokens])
        async for output in self._client.generate(ids, parameters, f"alter-write-{uuid.uuid4()}"):
            if output.finished:
                return str(output.outputs[0].text)
        raise EngineError(
            "The engine ended a request without an answer",
            expected="a finished request",
            got="nothing",
            fix="It is tried again.",
        )
