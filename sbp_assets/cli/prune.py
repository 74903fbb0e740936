"""`sbp prune`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.cli.profile import Profile, activate
from sbp_assets.cli.progress import tracked
from sbp_assets.cli.store import require_store
from sbp_assets.instance.home import require_writable
from sbp_assets.instance.storage import exclusive_instance, instance_exists

SHOWN = 20  # paths of what is not the project's own


def prune(
    profile: Profile = None,
    days: Annotated[float, typer.Option(min=0, help="Leave what is younger than this many days.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove what no current state needs: superseded runs and artifacts, unfinished writes, old copies.

    Every artifact that the settings define stays, and all that staleness, `sbp trace` and the UI say of it. So does
    what is not this project's own, which is listed.
    """
    settings = activate(profile, instance=False)
    deployment = settings.deployment
    if not instance_exists(settings):  # and none is created by looking
        raise CommandError(f"nothing to prune: there is no run and event storage in {deployment.instance_dir}")
    import dagster as dg
    from rich.filesize import decimal

    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration.prune import carry_out, look
    from sbp_assets.orchestration.runner import end_killed_runs
    from sbp_assets.orchestration.staleness import Staleness

    defs = build_definitions(settings)
    with ExitStack() as stack:
        stack.enter_context(exclusive_instance(settings, "running `sbp prune`"))
        instance = stack.enter_context(dg.DagsterInstance.get())
        require_store(defs, Staleness(defs.resolve_asset_graph(), instance), deployment)
        if not dry_run:
            require_writable(settings)
            end_killed_runs(instance)
        plan = look(settings, defs, instance, days)
        if plan.unfinished and not dry_run:
            raise CommandError(
                f"runs that have not ended, as {plan.unfinished[0]}: {len(plan.unfinished)}. Let them end or cancel "
                "them: what they need is not known yet"
            )
        if not dry_run:
            carry_out(plan, defs, instance, tracked)
    kinds = plan.kinds()
    for kind, (count, size) in kinds.items():
        typer.echo(f"{kind:<24}{count:>9,}{decimal(size):>12}")
    count, size = (sum(numbers) for numbers in zip((0, 0), *kinds.values(), strict=True))
    typer.echo(f"{'to remove' if dry_run else 'removed':<24}{count:>9,}{decimal(size):>12}")
    if plan.unknown:
        typer.echo(f"not this project's own, and left: {len(plan.unknown)}")
        for path in plan.unknown[:SHOWN]:
            typer.echo(f"  {path}")
        if len(plan.unknown) > SHOWN:
            typer.echo(f"  and {len(plan.unknown) - SHOWN} more")
