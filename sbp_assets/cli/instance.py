"""`sbp ui` and `sbp env`: Dagster's own programs on the profile's instance."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from typing import Annotated

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.cli.profile import (
    ENV_PROFILE,
    OF_THE_PROFILE,
    Profile,
    activate,
    command_line,
    other_profile_of_shell,
)
from sbp_assets.instance.branch import branch_environment, branch_of, overrides
from sbp_assets.instance.home import dagster_environment, require_writable
from sbp_assets.instance.storage import DRIVER, POSTGRES_URL, schema_name
from sbp_assets.settings import load_settings, variable
from sbp_assets.settings.deployment import EXPERIMENT_FOLDERS


def ui(
    profile: Profile = None,
    port: Annotated[int, typer.Option(help="Port of the webserver.", min=1, max=65535)] = 3000,
) -> None:
    """Open the Dagster UI and start the daemon on the profile's instance, on loopback."""
    require_writable(activate(profile), ["instance_dir"])  # a store on a read-only disk can be looked at
    # The daemon would go on without a page, and say that there is one.
    with socket.socket() as listener, socket.socket() as other:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a webserver that has just ended is no reason
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            other.bind(("127.0.0.1", 0))
            choose = command_line("ui", "--port", str(other.getsockname()[1]))
            raise CommandError(
                f"port {port} of this machine cannot be used: {error.strerror}. Choose another one, as in: {choose}"
            ) from None
    workspace = os.environ["SBP_WORKSPACE"]
    os.environ["PYTHONSAFEPATH"] = "1"  # another checkout in the current directory is not this one
    command = [sys.executable, "-m", "dagster", "dev", "-w", workspace, "-h", "127.0.0.1", "-p", str(port)]
    # A script's shell starts background jobs with SIGINT ignored, and Dagster ends on SIGTERM by sending itself SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execv(sys.executable, command)


def env(
    profile: Profile = None,
    branch: Annotated[str | None, typer.Option(help="Act on this branch of the profile's store.")] = None,
) -> None:
    """Print export lines for bare `dagster` commands: eval "$(sbp env)"."""
    if profile:
        os.environ["SBP_PROFILE"] = profile
    left = _leave_other_profile()
    settings = activate(None)
    if branch:
        os.environ.update(branch_environment(settings, branch))
        settings = load_settings()
    variables = dagster_environment(settings)
    variables[ENV_PROFILE] = variables["SBP_PROFILE"]
    variables |= {name: value for name, value in os.environ.items() if name.startswith("SBP_") and "__" in name}
    variables |= {variable("deployment", key): getattr(settings.deployment, key) for key in EXPERIMENT_FOLDERS}
    if os.environ.get(POSTGRES_URL):
        variables[variable("deployment", "postgres_schema")] = schema_name(settings)
    for name in sorted(left - variables.keys()):
        typer.echo(f"unset {name}")
    for name, value in variables.items():
        typer.echo(f"export {name}={shlex.quote(value)}")
    if os.environ.get(POSTGRES_URL):
        # Its value stays where it is: it holds a password.
        typer.echo(f'export {POSTGRES_URL}="{DRIVER}:${{{POSTGRES_URL}#*:}}"')


def _leave_other_profile() -> set[str]:
    """Remove from this process what `sbp env` exported for another profile or a branch of it; returns the names."""
    if not other_profile_of_shell():
        return set()
    names = {ENV_PROFILE, *OF_THE_PROFILE}
    if branch := branch_of(os.environ.get(variable("deployment", "data_dir"), "")):
        names |= overrides(branch.changes).keys()
    return {name for name in names if os.environ.pop(name, None) is not None}
