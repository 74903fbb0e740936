"""`sbp run`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.cli.profile import Profile, activate, command_line
from sbp_assets.cli.store import require_store
from sbp_assets.instance.branch import branch_of
from sbp_assets.instance.home import require_writable
from sbp_assets.instance.storage import exclusive_instance
from sbp_assets.settings import Settings

if TYPE_CHECKING:
    from sbp_assets.orchestration.display import StepState


# The configuration of a run that fits the quantisers to the present documents.
REFIT = {"ops": {"pairing__quantizer": {"config": {"refit": True}}}}


def run(
    profile: Profile = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step (a job's name).")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this step alone (repeat for more); what is before it is taken as it is."),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Look for new and changed source files first.")] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the quantisers of the neighbour search to the present documents.")
    ] = False,
) -> None:
    """Materialise every missing or stale asset, then print the comparison, the report's path and the failed checks."""
    settings = activate(profile)
    require_writable(settings)
    started = time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear the display
    import dagster as dg

    from sbp_assets.definitions import build_definitions
    from sbp_assets.fan_out import open_engine
    from sbp_assets.orchestration.failed_checks import failed_check_lines, failed_checks
    from sbp_assets.orchestration.pipeline import pipeline_of
    from sbp_assets.orchestration.runner import PipelineError, end_killed_runs, run_pipeline
    from sbp_assets.orchestration.staleness import Staleness
    from sbp_assets.pairing.embed import Embedder
    from sbp_assets.synthesis.engine import Generator, head_size_problem

    pipeline = pipeline_of(settings)
    names = [step.name for step in pipeline]
    if until and until not in names:
        raise typer.BadParameter(f"{until!r} is not a step; steps are {', '.join(names)}", param_hint="--until")
    if wrong := [name for name in only or () if name not in names]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a step; steps are {', '.join(names)}", param_hint="--only")
    if only and (until or refresh or refit):
        raise typer.BadParameter("goes without --until, --refresh and --refit", param_hint="--only")
    if refit and until and names.index(until) < names.index("fit_quantizer"):
        raise typer.BadParameter(f"--until {until} ends before the quantisers are fitted", param_hint="--refit")
    # Known from the settings, but the engines would say so only after three models have been trained.
    if "synthesise" in (only or names[: names.index(until) + 1 if until else None]):
        deployment, head_size = settings.deployment, settings.experiment.model.head_dim
        if problem := head_size_problem(head_size, deployment.generation_engine, deployment.device):
            raise CommandError(problem)
    embedder, generator, fan_out = Embedder(), Generator(), open_engine(settings)
    defs = build_definitions(settings, {"embedder": embedder, "generator": generator, "fan_out": fan_out})
    with ExitStack() as stack:
        stack.enter_context(exclusive_instance(settings, "running `sbp run`"))
        # Closed before another process may hold the instance, which would load engines of its own beside these.
        stack.callback(embedder.close)
        stack.callback(generator.close)
        stack.callback(fan_out.close)
        instance = stack.enter_context(dg.DagsterInstance.get())
        end_killed_runs(instance)
        require_store(defs, Staleness(defs.resolve_asset_graph(), instance), settings.deployment)
        engines = {
            "embed": embedder.close,
            "search": fan_out.close,
            "synthesise": generator.close,
            "filter_synthetic": embedder.close,
            "measure_quality": embedder.close,
        }
        if only:
            pipeline = tuple(step for step in pipeline if step.name in only)
        steps = pipeline[: names.index(until) + 1] if until else pipeline

        def checks() -> str:
            failed = failed_checks(defs.resolve_asset_graph(), instance, [key for step in steps for key in step.keys])
            return failed_check_lines(failed)

        forced: dict[str, dict[str, Any]] = {}
        if refresh:
            forced["manifest"] = {}
        if refit:
            forced["fit_quantizer"] = REFIT
        try:
            states = run_pipeline(defs, instance, engines, until, forced, pipeline)
        except PipelineError:
            if lines := checks():
                typer.echo("\n" + lines)
            raise
        lines = checks()
    typer.echo("\n" + step_table(states, time.monotonic() - started))
    if not until and not only:
        typer.echo(results(settings))
    if lines:
        typer.echo("\n" + lines)


def step_table(states: Sequence[StepState], wall_seconds: float) -> str:
    """Return what each step that did something took, as a plain-text table, with the sum of it over `wall_seconds`."""
    from sbp_assets.orchestration.display import StepStatus

    done = [state for state in states if state.status is StepStatus.DONE]
    width = max([len("step"), *(len(state.step.title) for state in done)]) + 1
    lines = [f"{'step':<{width}}{'partitions':>11}{'seconds':>9}{'own work':>10}"] if done else []
    for state in done:
        share = f"{state.own_seconds / max(state.seconds, 1e-9):.0%}"
        lines.append(f"{state.step.title:<{width}}{len(state.partitions):>11}{state.seconds:>9.1f}{share:>10}")
    if own := sum(state.own_seconds for state in states):
        lines.append(f"{'all':<{width}}{'':>11}{wall_seconds:>9.1f}{own / wall_seconds:>10.0%}")
        lines.append("own work: the assets' wall_seconds; the rest is Dagster's event storage, checks and start-up")
    else:
        lines.append("nothing to do: everything is up to date")
    return "\n".join(lines)


def results(settings: Settings) -> str:
    """Return the comparison of a finished run and where its report and its runs are seen, as plain text.

    Raises CommandError where the store has lost the comparison since.
    """

    from sbp_assets.evaluation.comparison_table import render_table
    from sbp_assets.storage.paths import read_table
    from sbp_assets.storage.remote import root, url

    data = root(settings.deployment.data_dir)
    try:
        lines = ["", render_table(read_table((data / "evaluation/comparison.parquet").read_bytes()))]
        report = url(data / "evaluation/report")
    except FileNotFoundError as error:
        raise CommandError(
            f"{error.filename or error} is gone from the store since it was materialised; `{command_line('verify')}` "
            "finds what else is"
        ) from None
    if settings.note:
        lines += ["", f"note: {settings.note}"]
    lines += ["", f"report: {report}/index.html", f"runs: {how_to_open(settings)}"]
    return "\n".join(lines)


def how_to_open(settings: Settings) -> str:
    """Return the command that opens this instance in Dagster's UI, as a line for people."""
    if branch := branch_of(settings.deployment.data_dir):
        return f'after eval "$({command_line("env", "--branch", branch.name)})", `sbp ui` opens this branch\'s instance'
    return f"`{command_line('ui')}`, with the same environment, opens this instance in Dagster's UI"
