"""How a command ends: one clear red line for what went wrong, and the exit code a script can rely on.

0 done; 1 it failed, the line on stderr says why and what to do; 2 wrong usage (click's own); 130 Ctrl-C.
"""

from __future__ import annotations

import errno
from typing import IO, Any

import click

from calm.errors import CalmError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class Failure(click.ClickException):
    """A failure that the user can do something about."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(click.style("error: ", fg="red", bold=True) + self.message, err=True)


class RootGroup(click.Group):
    """Turns CALM's errors into a Failure, and Ctrl-C into 130, for every command below it."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except CalmError as error:
            raise Failure(error.message) from error
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failure(describe(error)) from error


def describe(error: OSError) -> str:
    """`/path: Permission denied` and the like."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
