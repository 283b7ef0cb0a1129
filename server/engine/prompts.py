"""The token ids that a text or a chat becomes on vLLM's server, and what each of them reads as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import State
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.exceptions import VLLMValidationError

from alter_core.errors import PromptError

from .base import Message, PromptToken


class VllmPrompts:
    """Renders as vLLM's own chat and completion routes do. Nothing is logged."""

    def __init__(self, state: State) -> None:
        """`state`: of vLLM's application; what is needed of it is there once the server listens."""
        self._state = state

    async def read(self, prompt: str | Sequence[Message]) -> tuple[PromptToken, ...]:
        """See `Prompts.read`."""
        serving = self._state.serving_tokenization
        try:
            rendered = await self._rendered(serving, prompt)
        except (ValueError, TypeError, VLLMValidationError) as error:
            raise PromptError(
                "The server cannot make a prompt of this",
                expected="a text, or messages that the chat template takes",
                got=type(error).__name__,
                fix="Send what /v1/chat/completions takes; without a chat template, a text.",
            ) from error
        ids = [token for each in rendered for token in _token_ids(serving, each)]
        longest = serving.model_config.max_model_len - 1
        if not 0 < len(ids) <= longest:
            raise PromptError(
                "This prompt has no token, or too many",
                expected=f"1 to {longest} tokens",
                got=str(len(ids)),
                fix="Send a shorter text, or less of the conversation.",
            )
        return tuple(map(PromptToken, ids, _pieces(serving.renderer.get_tokenizer(), ids)))

    async def _rendered(self, serving: Any, prompt: str | Sequence[Message]) -> list[Any]:
        renderer = serving.online_renderer
        if isinstance(prompt, str):
            request = TokenizeCompletionRequest(prompt=prompt)
            return list(
                await renderer.preprocess_completion(
                    request, prompt_input=prompt, prompt_embeds=None, skip_mm_cache=True
                )
            )
        has_answer = prompt[-1]["role"] == "assistant"
        chat = TokenizeChatRequest(messages=list(prompt), add_generation_prompt=not has_answer)
        _, inputs = await renderer.preprocess_chat(
            chat,
            chat.messages,
            default_template=serving.chat_template,
            default_template_content_format=serving.chat_template_content_format,
            default_template_kwargs=serving.default_chat_template_kwargs,
            tool_dicts=None,
            skip_mm_cache=True,
        )
        return list(inputs)


def _token_ids(serving: Any, rendered: Any) -> list[int]:
    return list(serving._extract_prompt_components(rendered).token_ids or ())


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens comes with its last one."""
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.decode([token]) for token in ids]
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(backend, token) or "" for token in ids]
