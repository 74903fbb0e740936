"""`sbp plan`."""

from __future__ import annotations

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.cli.profile import Profile, activate


def plan(profile: Profile = None) -> None:
    """Print what a run would materialise and cost, without running anything."""
    settings = activate(profile, instance=False)
    from sbp_assets.cli import estimate
    from sbp_assets.corpus.errors import CorpusError
    from sbp_assets.definitions import build_definitions
    from sbp_assets.pretraining.budget import BudgetError
    from sbp_assets.synthesis.engine import head_size_problem

    graph = build_definitions(settings).resolve_asset_graph()
    assets = {}
    for key in graph.toposorted_asset_keys:
        partitions = graph.get(key).partitions_def
        assets[key.to_user_string()] = len(partitions.get_partition_keys()) if partitions else 1
    try:
        typer.echo(estimate.render(estimate.plan(settings, assets)))
    except (BudgetError, CorpusError) as error:  # what `sbp run` would find out later
        raise CommandError(str(error)) from None
    deployment = settings.deployment
    if problem := head_size_problem(
        settings.experiment.model.head_dim, deployment.generation_engine, deployment.device
    ):
        typer.secho(f"\n`sbp run` will refuse this profile: {problem}", fg="red")
