"""The `alter` command: what the packages offer, put together.

Results go to stdout, logs to stderr; exit 0 for success, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from alter_core.errors import AlterError, ConfigError, UnsupportedEngineError

from .bundle import bundle_app
from .demo.command import demo_command

app = typer.Typer(
    name="alter",
    help="Make a running vLLM server forget a domain, and remember it again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _compose() -> None:
    from trainer.cli import train_command

    from server.cli import SERVE_CONTEXT, domains_app, serve_command

    app.command("demo")(demo_command)
    app.command("train")(train_command)
    app.command("serve", context_settings=SERVE_CONTEXT)(serve_command)
    app.add_typer(bundle_app, name="bundle")
    app.add_typer(domains_app, name="domains")


def app_main() -> None:
    """Entry point of the console script."""
    _compose()
    try:
        app()
    except (ConfigError, UnsupportedEngineError) as error:
        _fail(error, 2)
    except AlterError as error:
        _fail(error, 1)


def _fail(error: AlterError, code: int) -> None:
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    app_main()
