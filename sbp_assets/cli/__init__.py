"""The command line: `sbp run` materialises everything, `sbp verify` checks what is there, `sbp plan` says what it would
take, `sbp trace` says where something comes from, `sbp ui` opens Dagster."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from sbp_assets.instance.home import activate, dagster_environment
from sbp_assets.instance.storage import DRIVER, POSTGRES_URL, exclusive_instance, exists, prepare, schema
from sbp_assets.settings import Settings, SettingsError, load_settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Profile = Annotated[
    str | None, typer.Option("--profile", "-p", help="Profile name or YAML path; default $SBP_PROFILE, then demo.")
]


def _activate(profile: str | None, instance: bool = True) -> Settings:
    """Load the profile and put what Dagster reads into the environment; what is wrong with it ends the command.

    With `instance`, make what Dagster's instance needs.
    """
    if profile:
        os.environ["SBP_PROFILE"] = profile
    try:
        settings = load_settings()
        activate(settings)
        if instance:
            prepare(settings)
    except SettingsError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    return settings


@app.command()
def run(
    profile: Profile = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step (a job's name).")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Look for new and changed source files first.")] = False,
) -> None:
    """Materialise every missing or stale asset, then print the comparison and the report's path."""
    settings = _activate(profile)
    started = time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear the display
    import dagster as dg
    from sqlalchemy.exc import DBAPIError

    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration.display import StepStatus
    from sbp_assets.orchestration.pipeline import PIPELINE
    from sbp_assets.orchestration.runner import end_killed_runs, run_pipeline
    from sbp_assets.pairing.embed import Embedder
    from sbp_assets.synthesis.engine import Generator

    embedder, generator = Embedder(), Generator()
    defs = build_definitions(settings, {"embedder": embedder, "generator": generator})
    engines = {"embed": embedder.close, "synthesise": generator.close}
    names = [step.name for step in PIPELINE]
    if until and until not in names:
        raise typer.BadParameter(f"{until!r} is not a step; steps are {', '.join(names)}", param_hint="--until")
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_instance(settings, "running `sbp run`"))
            instance = stack.enter_context(dg.DagsterInstance.get())
            end_killed_runs(instance)
            states = run_pipeline(defs, instance, engines, until, refresh)
        except KeyboardInterrupt:
            typer.secho("Stopped. What was made is kept, and the same command goes on from there.", err=True)
            raise typer.Exit(130) from None
        except RuntimeError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(1) from None
        except DBAPIError as error:  # the server is away, or the disk of the database's file is full
            told = (
                f"Dagster's records cannot be kept: {str(error.orig).strip()}. Mend that and run the same command again"
            )
            typer.secho(f"{told}: what was made is kept.", fg="red", err=True)
            raise typer.Exit(1) from None
        finally:
            embedder.close()
            generator.close()
    wall = time.monotonic() - started
    typer.echo(f"\n{'step':<28}{'partitions':>11}{'seconds':>9}{'own work':>10}")
    for state in states:
        if state.status is StepStatus.DONE:
            share = f"{state.own_seconds / max(state.seconds, 1e-9):.0%}"
            typer.echo(f"{state.step.title:<28}{len(state.partitions):>11}{state.seconds:>9.1f}{share:>10}")
    own = sum(state.own_seconds for state in states)
    if own:
        typer.echo(f"{'all':<28}{'':>11}{wall:>9.1f}{own / wall:>10.0%}")
        typer.echo("own work: the assets' wall_seconds; the rest is Dagster's records, checks and start-up")
    else:
        typer.echo("nothing to do: everything is up to date")
    if until:
        return
    import polars as pl

    from sbp_assets.evaluation.comparison_table import render_table
    from sbp_assets.storage.remote import root, url

    data = root(settings.deployment.data_dir)
    comparison = pl.read_parquet((data / "evaluation/comparison.parquet").read_bytes())
    typer.echo("\n" + render_table(comparison))
    typer.echo(f"\nreport: {url(data / 'evaluation/report')}/index.html")
    typer.echo("records: `make ui` (or `sbp ui`, with the same settings) opens this instance in Dagster's UI")


@app.command()
def verify(
    steps: Annotated[list[str] | None, typer.Argument(help="Steps (jobs' names) to look at; default: all.")] = None,
    profile: Profile = None,
) -> None:
    """Evaluate every check on the artifacts as they lie in the store, making nothing anew.

    Finds what rotted, was changed or went missing since it was made. `sbp run` then makes it again.
    """
    settings = _activate(profile)
    import dagster as dg

    from sbp_assets.dagster_support.preview import printable
    from sbp_assets.dagster_support.stage import io_manager_keys
    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration.pipeline import PIPELINE
    from sbp_assets.orchestration.runner import Outcome, end_killed_runs, step_partitions
    from sbp_assets.orchestration.runner import verify as verify_partition
    from sbp_assets.orchestration.staleness import Staleness
    from sbp_assets.storage.io_managers import ArtifactStore

    defs = build_definitions(settings)
    known = {step.name: step for step in PIPELINE}
    if wrong := [name for name in steps or () if name not in known]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a step; steps are {', '.join(known)}", param_hint="STEPS")
    damaged = unknown = 0
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_instance(settings, "running `sbp verify`"))
        except RuntimeError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(1) from None
        instance = stack.enter_context(dg.DagsterInstance.get())
        end_killed_runs(instance)
        staleness = Staleness(defs.resolve_asset_graph(), instance)
        made = []
        for step in (known[name] for name in steps or known):
            versions = [staleness.versions(key) for key in step.keys]
            made += [(step, name) for name in step_partitions(defs, step) if all(name in found for found in versions)]
        # Red checks are kept, and what is red is made again: not for a mistyped setting or a disk that is away.
        store = ArtifactStore(settings.deployment.data_dir, settings.deployment)
        managers = store.managers(io_manager_keys(defs))
        keys = [key for step in PIPELINE for key in step.keys]
        try:
            there = any(managers[key].etag(key, name) for key in keys for name in [*staleness.versions(key)][:1])
        except RuntimeError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(2) from None
        if made and not there:
            told = f"{settings.deployment.data_dir} holds nothing of what the records know; is it the right data_dir?"
            typer.secho(told, fg="red", err=True)
            raise typer.Exit(2)
        for step, partition in _track("checking")(made):
            result = verify_partition(defs, instance, step, partition)
            damaged += result.outcome is Outcome.FAILED
            unknown += result.outcome is Outcome.CRASHED
            name = " ".join(filter(None, (step.name, partition)))
            if result.outcome is Outcome.FAILED:
                typer.secho(f"{name}: {', '.join(result.names)}", fg="red")
                for line in (line for reason in result.failed.values() for line in reason.splitlines()):
                    typer.echo(f"  {printable(line)}")
            elif result.outcome is Outcome.CRASHED:
                typer.secho(f"{name}: check crashed, its run's log says why: {', '.join(result.names)}", fg="red")
    told = f"{len(made)} partitions looked at, {damaged} damaged"
    told += "; `sbp run` makes them again" * bool(damaged) + f"; {unknown} could not be looked at" * bool(unknown)
    typer.echo(told)
    if damaged or unknown:
        raise typer.Exit(1)


@app.command()
def branch(
    name: Annotated[str, typer.Argument(help="Of the branch: letters, digits, underscores.")],
    changes: Annotated[list[str], typer.Argument(help="Settings of the experiment, as in pairing.min_similarity=0.8.")],
    profile: Profile = None,
) -> None:
    """Run other settings on a copy of the finished artifacts: only what they change is made anew.

    `sbp env --branch NAME` prints what makes `sbp ui`, `sbp trace` and the rest act on the branch.
    """
    settings = _activate(profile, instance=False)
    from sbp_assets.instance.branch import parse_changes, run_branch

    try:
        run_branch(settings, name, parse_changes(changes))
    except (SettingsError, RuntimeError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    except subprocess.CalledProcessError as error:
        raise typer.Exit(error.returncode) from None  # it has said why


@app.command()
def plan(profile: Profile = None) -> None:
    """Print what a run would make and cost, without running anything."""
    settings = _activate(profile, instance=False)
    from sbp_assets.cli.plan import plan as make_plan
    from sbp_assets.cli.plan import render
    from sbp_assets.definitions import build_definitions

    graph = build_definitions(settings).resolve_asset_graph()
    assets = {}
    for key in graph.toposorted_asset_keys:
        partitions = graph.get(key).partitions_def
        assets[key.to_user_string()] = len(partitions.get_partition_keys()) if partitions else 1
    typer.echo(render(make_plan(settings, assets)))


@app.command()
def trace(
    name: Annotated[str, typer.Argument(metavar="ID", help="See the list above.")],
    profile: Profile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show where a document, a synthesis, a pair or a score comes from, and what it went into.

    ID is one of:

    \b
      concepts-0000012           a document, by its id
      syn-concepts-0000012-3     a synthetic document: syn-SEED-ROLLOUT
      'a->b'                     a pair of two documents (quote it)
      heldout/perplexity/sbp/0   a score: TASK/METRIC/ARM, and /SEED for one of several
      sbp_scores                 an asset, or pretraining/sbp_model/0: a partition of it
    """
    settings = _activate(profile, instance=False)
    import dagster as dg

    from sbp_assets.definitions import build_definitions
    from sbp_assets.provenance.lookup import UnknownIdError
    from sbp_assets.provenance.records import Records, graph_of
    from sbp_assets.provenance.store import NotMaterialisedError, Store
    from sbp_assets.provenance.view import show
    from sbp_assets.provenance.walk import trace as walk

    deployment, defs = settings.deployment, build_definitions(settings)
    with ExitStack() as stack:
        # Looked at only: an instance that is not there is not made.
        try:
            there = exists(settings)
        except SettingsError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(2) from None
        instance = stack.enter_context(dg.DagsterInstance.get()) if there else None
        store = Store(
            deployment.data_dir,
            f"{deployment.work_dir}/cache",
            graph_of(defs),
            deployment.memory_limit,
            deployment.cache_gb,
            deployment.storage_patience,
        )
        stack.callback(store.close)
        try:
            traces = walk(name, settings, store, Records(defs, instance))
        except (UnknownIdError, NotMaterialisedError) as error:
            where = f"Looked at profile {settings.profile}, artifacts in {deployment.data_dir}."
            typer.secho(f"{error}\n{where} --profile or another directory may hold what you mean.", fg="red", err=True)
            raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"id": name, "profile": settings.profile, "traces": traces}, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width to fit
    for one in traces:
        show(one, console)
    if not there:
        typer.echo(f"no Dagster records of {deployment.data_dir}: versions, runs and staleness are not known")


def _track(what: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Hand on things one by one, showing how far it is and how long it will take."""
    from rich.console import Console
    from rich.progress import track

    return lambda things: track(things, what, console=Console(stderr=True))


@app.command("copy-artifacts")
def copy_artifacts(
    destination: Annotated[str, typer.Argument(help="Path or fsspec URL of the other store.")], profile: Profile = None
) -> None:
    """Copy every artifact that was made to another store, which SBP_DEPLOYMENT__DATA_DIR may then name.

    Started again, it goes on where it stopped. Removes nothing.
    """
    settings = _activate(profile)
    import hashlib
    from pathlib import Path

    import dagster as dg

    from sbp_assets.dagster_support.stage import io_manager_keys
    from sbp_assets.definitions import build_definitions
    from sbp_assets.orchestration.staleness import Staleness
    from sbp_assets.storage.copy import Artifact
    from sbp_assets.storage.copy import copy_artifacts as copy
    from sbp_assets.storage.io_managers import ArtifactStore

    deployment, defs = settings.deployment, build_definitions(settings)
    try:
        there = load_settings(environ={**os.environ, "SBP_DEPLOYMENT__DATA_DIR": destination}).deployment
        if there.data_dir == deployment.data_dir:
            raise SettingsError(f"{destination} is where the artifacts are: name another store")
        with exclusive_instance(settings, "copying artifacts"), dg.DagsterInstance.get() as instance:
            graph = defs.resolve_asset_graph()
            staleness = Staleness(graph, instance)
            made = [
                Artifact(key, partition, version)
                for key in graph.toposorted_asset_keys
                for partition, version in staleness.versions(key).items()
            ]
            name = hashlib.sha256(f"{deployment.data_dir} {there.data_dir}".encode()).hexdigest()[:16]
            ledger = Path(deployment.work_dir) / "copied" / f"{name}.jsonl"
            keys = io_manager_keys(defs)
            source = ArtifactStore(deployment.data_dir, deployment).managers(keys)
            target = ArtifactStore(there.data_dir, there).managers(keys)
            copied = copy(made, source, target, ledger, _track("copying artifacts"))
    except (SettingsError, RuntimeError, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"copied {copied.now} artifacts to {there.data_dir}" + f", {copied.before} before" * bool(copied.before))
    if copied.corrupted:
        typer.secho(f"not copied, for their content is not what was made: {', '.join(copied.corrupted)}", fg="red")
        raise typer.Exit(1)


@app.command("to-postgres")
def to_postgres(profile: Profile = None) -> None:
    """Copy the profile's records from SQLite into the database of $SBP_POSTGRES_URL; removes nothing."""
    if not os.environ.get(POSTGRES_URL):
        typer.secho(f"set ${POSTGRES_URL} to the database that the records go to", fg="red", err=True)
        raise typer.Exit(2)
    settings = _activate(profile)
    import dagster as dg

    from sbp_assets.instance.copy_records import copy_records

    try:
        with exclusive_instance(settings, "copying records"), dg.DagsterInstance.get():  # which makes the tables
            runs = copy_records(settings.deployment.instance_dir, os.environ[POSTGRES_URL], _track("copying runs"))
    except (SettingsError, RuntimeError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"copied {runs} runs and what they made; from now on, with ${POSTGRES_URL}, they are read there")


@app.command()
def ui(profile: Profile = None, port: int = 3000) -> None:
    """Open the Dagster UI and daemon on the profile's instance, on loopback."""
    _activate(profile)
    workspace = os.environ["SBP_WORKSPACE"]
    os.environ["PYTHONSAFEPATH"] = "1"  # another checkout in the current directory is not this one
    command = [sys.executable, "-m", "dagster", "dev", "-w", workspace, "-h", "127.0.0.1", "-p", str(port)]
    os.execv(sys.executable, command)


@app.command()
def env(
    profile: Profile = None,
    branch: Annotated[str | None, typer.Option(help="Act on this branch of the profile's store.")] = None,
) -> None:
    """Print export lines for bare `dagster` commands: eval "$(sbp env)"."""
    settings = _activate(profile)
    if branch:
        from sbp_assets.instance.branch import branch_environment

        try:
            os.environ.update(branch_environment(settings, branch))
        except SettingsError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(2) from None
        settings = load_settings()
    overrides = {name: value for name, value in os.environ.items() if name.startswith("SBP_") and "__" in name}
    folders = {
        f"SBP_DEPLOYMENT__{name.upper()}": getattr(settings.deployment, name)
        for name in ("data_dir", "work_dir", "instance_dir")
    }
    for name, value in {**dagster_environment(settings), **overrides, **folders}.items():
        typer.echo(f"export {name}={shlex.quote(value)}")
    if os.environ.get(POSTGRES_URL):
        typer.echo(f"export SBP_DEPLOYMENT__POSTGRES_SCHEMA={schema(settings)}")
        # Its value stays where it is: it holds a password.
        typer.echo(f'export {POSTGRES_URL}="{DRIVER}:${{{POSTGRES_URL}#*:}}"')


if __name__ == "__main__":
    app()
