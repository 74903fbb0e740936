"""The one place where errors become messages and exit codes; commands raise, and catch only to add context."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from sbp_assets.instance.storage import InstanceInUseError
from sbp_assets.settings import SettingsError

FAILED = 1
REFUSED = 2  # settings, arguments or the state of the store do not allow the command; nothing was begun
INTERRUPTED = 130
# What a file system refuses, where the project has done nothing wrong.
_OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR,
}  # fmt: skip


class CommandError(Exception):
    """An error of a command that its user can act on, with the exit code that the command ends with."""

    def __init__(self, message: str, exit_code: int = REFUSED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ReportingGroup(TyperGroup):
    """The group of all commands: what is wrong ends the command with a message and an exit code.

    Other exceptions are faults of this project and keep their traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command of `ctx`; raises typer.Exit where it ends with an error that its user can act on."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # in a locale without a character, the rest is still told
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # which are RuntimeErrors
            raise
        except CommandError as error:
            raise _ended(error.exit_code, str(error)) from None
        except (SettingsError, InstanceInUseError) as error:
            raise _ended(REFUSED, str(error)) from None
        except subprocess.CalledProcessError as error:
            raise typer.Exit(error.returncode) from None  # the command of the process has said why
        except KeyboardInterrupt:
            stopped = "Stopped. What is finished is kept, and the same command resumes from there."
            raise _ended(INTERRUPTED, stopped, "yellow") from None
        except RuntimeError as error:  # a failed step, a store or an engine that cannot be used
            raise _ended(FAILED, str(error)) from None
        except OSError as error:
            if error.filename is None or error.errno not in _OF_THE_MACHINE:
                raise
            raise _ended(FAILED, f"{error.filename} cannot be used: {error.strerror}") from None
        except Exception as error:
            from sqlalchemy.exc import DBAPIError

            if not isinstance(error, DBAPIError):
                raise
            # The server is away, or the disk of the database's file is full.
            message = f"Dagster's run and event storage cannot be used: {str(error.orig).strip()}. "
            message += "Fix that and run the same command again: what is finished is kept."
            raise _ended(FAILED, message) from None


def _ended(exit_code: int, message: str, colour: str = "red") -> typer.Exit:
    typer.secho(message, fg=colour, err=True)
    return typer.Exit(exit_code)
