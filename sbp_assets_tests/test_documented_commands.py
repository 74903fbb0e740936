"""Commands in the documentation have the subcommands and options that the installed command lines know."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from dagster._cli import create_dagster_cli
from dagster._daemon.cli import create_dagster_daemon_cli
from dagster_webserver.cli import dagster_webserver

from sbp_assets.cli import app

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
COMMANDS = {
    "sbp": typer.main.get_command(app),
    "dagster": create_dagster_cli(),
    "dagster-daemon": create_dagster_daemon_cli(),
    "dagster-webserver": dagster_webserver,
}
# A span of code, or a line of a shell block; a comment, a pipe or a background sign ends it.
WRITTEN = re.compile(
    r"(?:`|^|exec code |uv run )(?:\.venv/bin/)?((?:sbp|dagster|dagster-daemon|dagster-webserver) [^`\n]+)", re.M
)


def commands(page: Path) -> list[str]:
    return [re.split(r" +[#&|]", found)[0] for found in WRITTEN.findall(page.read_text())]


def problem(written: str) -> str | None:
    """What the command line would refuse in `written`; None where it knows all of it."""
    name, *words = shlex.split(written)
    command = COMMANDS[name]
    while hasattr(command, "commands"):  # a group; typer has a copy of click's class of its own
        if not words:
            return None
        if words[0].startswith("-"):
            break
        subcommand = command.commands.get(words[0])
        if subcommand is None:
            return f"{written}: no such command {words[0]}"
        command, words = subcommand, words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
    return f"{written}: no such option {unknown}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path):
    assert [found for found in map(problem, commands(page)) if found] == []


def test_commands_are_found_and_unknown_ones_are_refused():
    assert sum(len(commands(page)) for page in PAGES) > 50
    assert problem("dagster asset materialize -m sbp_assets.definitions --select a") is None
    assert problem("dagster asset materialize -w workspace.yaml --select a")
    assert problem("sbp ruin") and problem("sbp run --again")
