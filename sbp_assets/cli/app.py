"""The command line: `sbp run` materialises everything, `sbp verify` checks what is stored, `sbp plan` says what a run
would take, `sbp trace` says where something comes from, `sbp ui` opens Dagster."""

from __future__ import annotations

import typer

from sbp_assets.cli.branch import branch
from sbp_assets.cli.copy import copy_artifacts, to_postgres
from sbp_assets.cli.errors import ReportingGroup
from sbp_assets.cli.instance import env, ui
from sbp_assets.cli.pilot import pilot
from sbp_assets.cli.plan import plan
from sbp_assets.cli.prune import prune
from sbp_assets.cli.run import run
from sbp_assets.cli.trace import trace
from sbp_assets.cli.verify import verify

app = typer.Typer(
    cls=ReportingGroup, add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False
)
# Modules of commands import what is heavy inside the command: `sbp --help` and `sbp env` take a quarter of a second.
for command in (run, verify, branch, plan, pilot, trace, copy_artifacts, to_postgres, prune, ui, env):
    app.command()(command)
