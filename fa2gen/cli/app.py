"""The `fa2gen` command itself: its groups, `--version`, and how errors end."""

from __future__ import annotations

import logging
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fa2gen import __version__
from fa2gen.cli import kernels, machine, measure, report
from fa2gen.cli.console import ExitStatus, examples
from fa2gen.errors import Fa2GenError, InfeasibleSpec, InvalidInput

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Turns fa2gen's own errors, and the operating system's, into a message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `fa2gen render ... | head`: typer ends quietly
        except (InvalidInput, InfeasibleSpec) as error:
            _fail(error, ExitStatus.USAGE)
        except (Fa2GenError, OSError) as error:
            _fail(error, ExitStatus.FAILED)


def _fail(error: Exception, status: ExitStatus) -> NoReturn:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    raise typer.Exit(status)


app = typer.Typer(
    name="fa2gen",
    cls=_Commands,
    help="Generate, build and check exact-attention CUDA kernels.",
    epilog=examples(
        "fa2gen doctor                   what is here, what will be used",
        "fa2gen build --arch sm90        compile the catalogue; no GPU needed",
        "fa2gen render --head-dim 128    read a kernel",
        "fa2gen build my.toml            what a spec of your own says",
        "fa2gen COMMAND --help           more of them",
    )
    + "\n\n[bold]Exit status[/]\n0 done, 1 something failed, 2 usage, 3 nothing here to run it on",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for part in (kernels.app, measure.app, report.app, machine.app):
    app.add_typer(part)
app.add_typer(machine.cache_app, name="cache")
app.add_typer(machine.shim_app, name="shim")


def main() -> NoReturn:
    """The console script."""
    app(prog_name="fa2gen")
    raise AssertionError("typer exits by itself")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fa2gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    from fa2gen import env

    logging.basicConfig(level=env.log_level(), format="fa2gen: %(message)s")
