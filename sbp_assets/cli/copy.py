"""`sbp copy-artifacts` and `sbp to-postgres`: a store and an instance move elsewhere."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sbp_assets.cli.errors import FAILED, CommandError
from sbp_assets.cli.profile import Profile, activate
from sbp_assets.cli.progress import tracked
from sbp_assets.cli.store import require_store
from sbp_assets.instance.home import require_writable
from sbp_assets.instance.storage import POSTGRES_URL, exclusive_instance
from sbp_assets.settings import load_settings


def copy_artifacts(
    destination: Annotated[str, typer.Argument(help="Path or fsspec URL of the other store.")], profile: Profile = None
) -> None:
    """Copy every materialised artifact to another store, which SBP_DEPLOYMENT__DATA_DIR may then name.

    Started again, it resumes. Removes nothing.
    """
    settings = activate(profile)
    import hashlib
    from pathlib import Path

    import dagster as dg

    from sbp_assets.dagster_support.stage import io_manager_keys
    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration.staleness import Staleness
    from sbp_assets.storage import copy
    from sbp_assets.storage.io_managers import ArtifactStore

    require_writable(settings)
    deployment, defs = settings.deployment, build_definitions(settings)
    there = load_settings(environ={**os.environ, "SBP_DEPLOYMENT__DATA_DIR": destination}).deployment
    if there.data_dir == deployment.data_dir:
        raise CommandError(f"{destination} is where the artifacts are: name another store")
    with exclusive_instance(settings, "copying artifacts"), dg.DagsterInstance.get() as instance:
        graph = defs.resolve_asset_graph()
        staleness = Staleness(graph, instance)
        require_store(defs, staleness, deployment)
        materialised = [
            copy.Artifact(key, partition, version)
            for key in graph.toposorted_asset_keys
            for partition, version in staleness.versions(key).items()
        ]
        name = hashlib.sha256(f"{deployment.data_dir} {there.data_dir}".encode()).hexdigest()[:16]
        ledger = Path(deployment.work_dir) / "copied" / f"{name}.jsonl"
        keys = io_manager_keys(defs)
        source = ArtifactStore(deployment).managers(keys)
        target = ArtifactStore(there).managers(keys)
        try:
            copied = copy.copy_artifacts(
                materialised, source, target, ledger, lambda artifacts: tracked(artifacts, "copying artifacts")
            )
        except OSError as error:  # a disk is full, or a folder cannot be written to
            raise CommandError(str(error), FAILED) from None
    typer.echo(f"copied {copied.now} artifacts to {there.data_dir}" + f", {copied.before} before" * bool(copied.before))
    if copied.corrupted:
        typer.secho(f"not copied, for their content is not what was made: {', '.join(copied.corrupted)}", fg="red")
        raise typer.Exit(FAILED)


def to_postgres(profile: Profile = None) -> None:
    """Copy the profile's run and event storage from SQLite into the database of $SBP_POSTGRES_URL; removes nothing."""
    if not os.environ.get(POSTGRES_URL):
        raise CommandError(f"set ${POSTGRES_URL} to the database that the run and event storage goes to")
    settings = activate(profile)
    import dagster as dg

    from sbp_assets.instance.copy_records import copy_records

    with (
        exclusive_instance(settings, "copying the run and event storage"),
        dg.DagsterInstance.get(),  # which creates the tables
    ):
        runs = copy_records(
            settings.deployment.instance_dir, os.environ[POSTGRES_URL], lambda runs: tracked(runs, "copying runs")
        )
    typer.echo(f"copied {runs} runs with their events; from now on, with ${POSTGRES_URL}, they are read there")
