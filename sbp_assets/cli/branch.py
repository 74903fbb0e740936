"""`sbp branch`."""

from __future__ import annotations

from typing import Annotated

import typer

from sbp_assets.cli.profile import Profile, activate


def branch(
    name: Annotated[str, typer.Argument(help="Name of the branch: letters, digits, underscores.")],
    changes: Annotated[list[str], typer.Argument(help="Settings of the experiment, as in pairing.min_similarity=0.8.")],
    profile: Profile = None,
) -> None:
    """Run other settings on a copy of the finished artifacts: only what they change is re-materialised.

    `sbp env --branch NAME` prints the environment in which `sbp ui`, `sbp trace` and the rest act on the branch.
    """
    settings = activate(profile, instance=False)
    from sbp_assets.instance.branch import parse_changes, run_branch

    run_branch(settings, name, parse_changes(changes))
