"""How a text is routed, as a heat map, beside what is answered to it."""

from __future__ import annotations

from starlette.responses import Response

from alter_core.errors import AlterError
from server.api.models import Trace, TraceToken
from server.engine.base import Message

from .pages import Visit

RETAIN = "retain"
_LEVELS = 10


async def ask_for_trace(visit: Visit) -> Response:
    """The form."""
    return visit.show("trace.html.jinja", given={"kind": "chat", "text": ""}, trace=None)


async def show_trace(visit: Visit) -> Response:
    """The form with what it asked for."""
    form = await visit.request.form()
    text, kind = str(form.get("text") or ""), str(form.get("kind") or "chat")
    prompt = text if kind == "text" else [Message(role="user", content=text)]
    trace = await visit.ask(visit.client.trace, prompt)
    answers = problem = None
    try:
        answers = await visit.ask(visit.client.answers, prompt)
    except AlterError as error:
        problem = error
    return visit.show(
        "trace.html.jinja",
        given={"kind": kind, "text": text},
        trace=trace,
        levels=[level(token) for token in trace.tokens],
        experts=_experts(trace),
        answers=answers,
        problem=problem,
    )


def level(token: TraceToken) -> int:
    """How much of the sum of Eq. 9 is forgetting: 0 for nothing, 10 for all of it."""
    weight = sum(each.weight for each in token.experts if each.expert != RETAIN)
    return min(_LEVELS, round(_LEVELS * weight))


def _experts(trace: Trace) -> dict[str, int]:
    """Tokens in which each one takes part, most first."""
    counts: dict[str, int] = {}
    for token in trace.tokens:
        for each in token.experts:
            counts[each.expert] = counts.get(each.expert, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
