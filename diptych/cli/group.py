"""The group of all commands, and how it tells a person's mistakes."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from diptych import __version__
from diptych.errors import UserError, nearest


class Mistake(click.ClickException):
    """A user's: one line on stderr, and an exit code."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        who = f"diptych, rank {number}" if (number := rank()) else "diptych"
        click.echo(f"{who}: {' '.join(self.message.splitlines())}", err=True)


def rank() -> int:
    """Of this process, where torchrun started several."""
    return int(os.environ.get("RANK", "0"))


class Stopped(Mistake):
    """By Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """A group that names the nearest command to a misspelt one, and tells a user's mistakes without a traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'{nearest(name, self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise Mistake(str(error)) from None
        except KeyboardInterrupt:
            raise Stopped("stopped by Ctrl-C") from None
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise Mistake(f"{error.filename}: {error.strerror}") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, message="diptych %(version)s")
def cli() -> None:
    """Train, fine-tune, evaluate and use models of pictures and words.

    Begin with `diptych demo`, or with pictures and captions of your own:
    `diptych train photos data.path=captions.json out=runs/mine`.
    """


def main() -> None:
    """The console script: exit code 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may be of bytes that are no text
    cli(prog_name="diptych")
