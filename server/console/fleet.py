"""Servers, domains, and changes of them."""

from __future__ import annotations

import uuid
from typing import cast, get_args

from starlette.responses import Response

from server.engine.base import InFlight

from .fields import choice_of, epoch_of, text_of
from .history import HEIGHT, WIDTH, RoutedTokenHistory, sparkline
from .pages import Page, Visit


async def show_fleet(visit: Visit) -> Response:
    """Who applies what."""
    fleet = await visit.ask(visit.client.fleet)
    status = await visit.ask(visit.client.status)
    return visit.show("fleet.html.jinja", fleet=fleet, status=status)


def show_domains(history: RoutedTokenHistory) -> Page:
    """What is active, with what was routed lately."""

    async def show(visit: Visit) -> Response:
        answer = await visit.ask(visit.client.list_domains)
        totals = {d.name: d.routed_tokens.high + d.routed_tokens.low for d in answer.domains}
        history.note(totals)
        rates = {name: history.rates(name) for name in totals}
        return visit.show(
            "domains.html.jinja",
            answer=answer,
            totals=totals,
            latest={name: each[-1][1] if each else None for name, each in rates.items()},
            points={name: sparkline(each) for name, each in rates.items()},
            size=(WIDTH, HEIGHT),
        )

    return show


async def ask_to_activate(visit: Visit) -> Response:
    """The form; once it is filled in, what would happen."""
    given = visit.request.query_params
    if "name" not in given:
        return visit.show("activate.html.jinja", choices=get_args(InFlight))
    answer = await visit.ask(visit.client.list_domains)
    active = {domain.name: domain for domain in answer.domains}
    return visit.show(
        "confirm_activate.html.jinja",
        name=text_of(given, "name"),
        bundle=text_of(given, "bundle"),
        in_flight=cast(InFlight, choice_of(given, "in_flight", get_args(InFlight))),
        replaced=active.get(given["name"].strip()),
        epoch=answer.epoch,
        key=str(uuid.uuid4()),
    )


async def activate(visit: Visit) -> Response:
    """Activates what was confirmed, unless something has changed since."""
    given = await _form(visit)
    operation = await visit.ask(
        visit.client.activate,
        text_of(given, "name"),
        text_of(given, "bundle"),
        in_flight=cast(InFlight, choice_of(given, "in_flight", get_args(InFlight))),
        if_epoch=epoch_of(given),
        idempotency_key=text_of(given, "key"),
        reason=given.get("reason", "").strip() or None,
        is_awaited=False,
    )
    return visit.go(f"/operations/{operation.id}")


async def ask_to_revoke(visit: Visit) -> Response:
    """What would happen."""
    answer = await visit.ask(visit.client.list_domains)
    domain = await visit.ask(visit.client.show, visit.request.path_params["name"])
    return visit.show(
        "confirm_revoke.html.jinja", domain=domain, epoch=answer.epoch, key=str(uuid.uuid4())
    )


async def revoke(visit: Visit) -> Response:
    """Revokes what was confirmed, unless something has changed since."""
    given = await _form(visit)
    operation = await visit.ask(
        visit.client.revoke,
        visit.request.path_params["name"],
        if_epoch=epoch_of(given),
        idempotency_key=text_of(given, "key"),
        reason=given.get("reason", "").strip() or None,
        is_awaited=False,
    )
    return visit.go(f"/operations/{operation.id}")


async def show_operation(visit: Visit) -> Response:
    """How far a change has come."""
    operation = await visit.ask(visit.client.operation, visit.request.path_params["id"])
    # A failed one is tried again.
    ends = operation.state == "active"
    return visit.show("operation.html.jinja", operation=operation, ends=ends)


async def _form(visit: Visit) -> dict[str, str]:
    form = await visit.request.form()
    return {name: value for name, value in form.items() if isinstance(value, str)}
