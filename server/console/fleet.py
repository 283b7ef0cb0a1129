"""Servers, domains, and changes of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import cast, get_args

from starlette.responses import Response

from alter_core.errors import ConfigError
from server.engine.base import InFlight

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
        name=_text(given, "name"),
        bundle=_text(given, "bundle"),
        in_flight=_in_flight(given),
        replaced=active.get(given["name"].strip()),
        epoch=answer.epoch,
        key=str(uuid.uuid4()),
    )


async def activate(visit: Visit) -> Response:
    """Activates what was confirmed, unless something has changed since."""
    given = await _form(visit)
    operation = await visit.ask(
        visit.client.activate,
        _text(given, "name"),
        _text(given, "bundle"),
        in_flight=_in_flight(given),
        if_epoch=_epoch(given),
        idempotency_key=_text(given, "key"),
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
        if_epoch=_epoch(given),
        idempotency_key=_text(given, "key"),
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


def _text(given: Mapping[str, str], name: str) -> str:
    """Raises: ConfigError."""
    text = given.get(name, "").strip()
    if not text:
        raise ConfigError(
            f"The field `{name}` is empty", expected="a value", got="none", fix="Fill it in."
        )
    return text


def _in_flight(given: Mapping[str, str]) -> InFlight:
    """Raises: ConfigError."""
    found = given.get("in_flight", "recompute")
    if found not in get_args(InFlight):
        raise ConfigError(
            "Running requests cannot be treated so",
            expected=" or ".join(get_args(InFlight)),
            got=repr(found[:40]),
            fix="Choose one of them.",
        )
    return cast(InFlight, found)


def _epoch(given: Mapping[str, str]) -> int:
    """The one that the decision was made on. Raises: ConfigError."""
    text = _text(given, "epoch")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            "The epoch is not a number", expected="digits", got=repr(text[:40]), fix="Start again."
        )
    return int(text)
