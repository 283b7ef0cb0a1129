"""The `alter` command: what the packages offer, put together.

Results go to stdout, logs to stderr; exit 0 for success, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import typer

app = typer.Typer(
    name="alter",
    help="Make a running vLLM server forget a domain, and remember it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _root() -> None:
    """Keeps subcommands as such when only one is loaded."""


def _demo() -> None:
    from .demo.command import demo_command

    app.command("demo")(demo_command)


def _train() -> None:
    from trainer.cli import train_command

    app.command("train")(train_command)


def _eval() -> None:
    from alter_eval.cli import eval_app

    app.add_typer(eval_app, name="eval")


def _serve() -> None:
    from server.cli import SERVE_CONTEXT, serve_command

    app.command("serve", context_settings=SERVE_CONTEXT)(serve_command)


def _bundle() -> None:
    from .bundle import bundle_app

    app.add_typer(bundle_app, name="bundle")


def _domains() -> None:
    from server.cli import domains_app

    app.add_typer(domains_app, name="domains")


def _requests() -> None:
    from server.requests_cli import requests_app

    app.add_typer(requests_app, name="requests")


def _evidence() -> None:
    from server.requests_cli import evidence_app

    app.add_typer(evidence_app, name="evidence")


def _fleet() -> None:
    from server.cli import fleet_command

    app.command("fleet")(fleet_command)


def _trace() -> None:
    from server.cli import trace_command

    app.command("trace")(trace_command)


def _audit() -> None:
    from server.cli import audit_app

    app.add_typer(audit_app, name="audit")


def _token() -> None:
    from server.cli import token_app

    app.add_typer(token_app, name="token")


_LOADERS: dict[str, Callable[[], None]] = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "serve": _serve,
    "bundle": _bundle,
    "domains": _domains,
    "requests": _requests,
    "evidence": _evidence,
    "fleet": _fleet,
    "trace": _trace,
    "audit": _audit,
    "token": _token,
}
"""What each command needs is imported only when it is called: torch alone takes seconds."""


@functools.cache
def whole_app() -> typer.Typer:
    """The application with every command, for who describes it; to run it, `app_main` loads less."""
    for load in _LOADERS.values():
        load()
    return app


def app_main() -> None:
    """Entry point of the console script."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted == "demo":
        # Before torch is loaded: on a busy machine, threads that spin while they wait starve each other.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name, load in _LOADERS.items():
        if wanted in (name, "") or wanted not in _LOADERS:
            load()
    from alter_core.errors import AlterError

    try:
        app()
    except AlterError as error:
        from server.cli import report

        sys.exit(report(error))


if __name__ == "__main__":
    app_main()
