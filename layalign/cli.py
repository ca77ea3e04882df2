"""The command line: which commands there are, and how they end."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from layalign.commands.answering import analyze, compare, evaluate, generate
from layalign.commands.development import bench, kernels
from layalign.commands.models import convert, info
from layalign.commands.options import SeveralTasks, SeveralValues
from layalign.commands.serving import serve
from layalign.extras import missing_extra
from layalign.family_table import models
from layalign.kernels.files import disk_error
from layalign.train.commands import demo, report, train
from layalign.train.data.command import cache
from layalign.train.tables.command import table

app = typer.Typer(
    help="LayAlign: a frozen LLM answers in languages it never learned, through a frozen multilingual encoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from layalign.versions import CORE, versions

        found = versions((*CORE, "triton"))
        rest = ", ".join(f"{name} {version}" for name, version in found.items() if name != "layalign")
        typer.echo(f"layalign {found.get('layalign', 'not installed')} ({rest})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Its version and those of what it runs on.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for command in (demo, train, report, cache, table, generate, compare, analyze, models, info, convert):
    app.command()(command)
app.command(cls=SeveralTasks)(evaluate)
app.command(cls=SeveralValues)(kernels)
_SMALLER = "A smaller --batch-size takes less"
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASSED_ON)(serve)
app.command(add_help_option=False, context_settings=_PASSED_ON)(bench)


def main() -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2; anything else keeps its traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = missing_extra(error, next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
        if missing is None:
            raise
        _end(missing)
    except ValueError as error:
        _end(str(error))
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        if error.filename is None:
            raise
        _end(f"{error.filename}: {(error.strerror or type(error).__name__).lower()}; choose another place")
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it for this
            advice = "`layalign train RECIPE --plan` says what takes how much" if "train" in sys.argv[1:2] else _SMALLER
            _end(f"{str(error).partition(chr(10))[0]} {advice}; what was saved before is as it was")
        reason = disk_error(error)
        if reason is None:
            raise
        where = getattr(error, "filename", None) or "the output"
        _end(
            f"{where} could not be written ({reason}); what was saved before is as it was. Make room and run the same command again"
        )


def _end(message: str) -> None:
    typer.echo(f"layalign: {message}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
