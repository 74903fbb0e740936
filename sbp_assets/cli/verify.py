"""`sbp verify`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from sbp_assets.cli.errors import FAILED, CommandError
from sbp_assets.cli.profile import Profile, activate, command_line
from sbp_assets.cli.progress import tracked
from sbp_assets.cli.store import require_store
from sbp_assets.instance.storage import exclusive_instance, instance_exists


def verify(
    steps: Annotated[list[str] | None, typer.Argument(help="Steps (jobs' names) to check; default: all.")] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Checks of one shard read all others, not a sample of deployment.checked_shards."),
    ] = False,
    profile: Profile = None,
) -> None:
    """Evaluate every check on the artifacts as they lie in the store, materialising nothing.

    Finds what was corrupted, changed or lost since it was materialised. `sbp run` then re-materialises it. Ends with a
    line for each check that failed, warnings too.
    """
    settings = activate(profile, instance=False)
    if full:
        everything = {"checked_shards": max(1, len(settings.experiment.shard_keys))}
        settings = settings.model_copy(update={"deployment": settings.deployment.model_copy(update=everything)})
    deployment = settings.deployment
    nothing = CommandError(
        f"nothing to verify: the instance {deployment.instance_dir} has no materialisations of "
        f"{', '.join(steps or ['any step'])} in {deployment.data_dir}. Are these the right directories? "
        f"`{command_line('run')}` materialises what is missing"
    )
    if not instance_exists(settings):  # and none is created by looking
        raise nothing
    import dagster as dg

    from sbp_assets.dagster_support.preview import printable
    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration import runner, verification
    from sbp_assets.orchestration.failed_checks import failed_check_lines, failed_checks
    from sbp_assets.orchestration.materialisations import Partition
    from sbp_assets.orchestration.pipeline import Step, pipeline_of
    from sbp_assets.orchestration.staleness import Staleness

    defs = build_definitions(settings)
    known = {step.name: step for step in pipeline_of(settings)}
    if wrong := [name for name in steps or () if name not in known]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a step; steps are {', '.join(known)}", param_hint="STEPS")
    corrupted = crashed = 0
    with ExitStack() as stack:
        stack.enter_context(exclusive_instance(settings, "running `sbp verify`"))
        instance = stack.enter_context(dg.DagsterInstance.get())
        runner.end_killed_runs(instance)
        staleness = Staleness(defs.resolve_asset_graph(), instance)
        materialised: dict[Step, list[Partition]] = {}
        for step in (known[name] for name in steps or known):
            versions = [staleness.versions(key) for key in step.keys]
            names = verification.step_partitions(defs, step)
            materialised[step] = [name for name in names if all(name in found for found in versions)]
        total = sum(map(len, materialised.values()))
        if not total:
            raise nothing
        # Failed checks are recorded, and what fails is re-materialised.
        require_store(defs, staleness, deployment)
        over_all = 0
        for step, partition, result in tracked(
            verification.verify_steps(defs, instance, materialised), "checking", total
        ):
            if partition == verification.OVER_ALL:
                over_all += result.outcome is verification.Outcome.FAILED
            else:
                corrupted += result.outcome is verification.Outcome.FAILED
            crashed += result.outcome is verification.Outcome.CRASHED
            name = " ".join(filter(None, (step.name, partition)))
            if result.outcome is verification.Outcome.FAILED:
                typer.secho(f"{name}: {', '.join(result.names)}", fg="red")
                for line in (line for reason in result.failed.values() for line in reason.splitlines()):
                    typer.echo(f"  {printable(line)}")
            elif result.outcome is verification.Outcome.CRASHED:
                typer.secho(f"{name}: check crashed, its run's log says why: {', '.join(result.names)}", fg="red")
        keys = [key for step, names in materialised.items() if names for key in step.keys]
        failed = failed_checks(defs.resolve_asset_graph(), instance, keys)
    if failed:
        typer.echo(failed_check_lines(failed))
    summary = f"{total} partitions checked, {corrupted} corrupted"
    if corrupted:
        summary += f"; `{command_line('run')}` re-materialises them"
    if over_all:
        summary += f"; {over_all} steps fail over all shards: materialise in the UI the shards that are named"
    if crashed:
        summary += f"; {crashed} could not be checked"
    typer.echo(summary)
    if corrupted or over_all or crashed:
        raise typer.Exit(FAILED)
