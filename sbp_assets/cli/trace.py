"""`sbp trace`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Annotated

import typer

from sbp_assets.cli.errors import FAILED, CommandError
from sbp_assets.cli.profile import Profile, activate, profile_name
from sbp_assets.instance.storage import instance_exists
from sbp_assets.settings.environment import as_utf8
from sbp_assets.settings.formats import is_one_line


def trace(
    name: Annotated[str, typer.Argument(metavar="ID", help="See the list above.")],
    profile: Profile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show where a document, a synthetic document, a pair or a score comes from, and what it went into.

    ID is one of:

    \b
      concepts-0000012           a document, by its id
      syn-concepts-0000012-3     a synthetic document: syn-SEED-ROLLOUT
      'a->b'                     a pair of two documents (quote it)
      heldout/perplexity/sbp/0   a score: TASK/METRIC/ARM, and /SEED for one of several
      sbp_scores                 an asset, or pretraining/sbp_model/0: a partition of it
    """
    settings, name = activate(profile, instance=False), as_utf8(name)
    if not is_one_line(name) or name.encode(errors="ignore").decode() != name:
        raise CommandError("ID is not UTF-8, or has a line break or another control character")
    import dagster as dg

    from sbp_assets.definitions import build_definitions
    from sbp_assets.provenance import walk
    from sbp_assets.provenance.lookup import UnknownIdError
    from sbp_assets.provenance.records import Records, graph_of
    from sbp_assets.provenance.store import NotMaterialisedError, Store
    from sbp_assets.provenance.view import show

    deployment, defs = settings.deployment, build_definitions(settings)
    with ExitStack() as stack:
        there = instance_exists(settings)  # an instance that is not there is not created by looking
        instance = stack.enter_context(dg.DagsterInstance.get()) if there else None
        store = Store(
            deployment.data_dir,
            f"{deployment.work_dir}/cache",
            graph_of(defs),
            deployment.memory_limit,
            deployment.cache_gb,
            deployment.storage_patience,
            profile_name(),
        )
        stack.callback(store.close)
        try:
            traces = walk.trace(name, settings, store, Records(defs, instance))
        except (UnknownIdError, NotMaterialisedError) as error:
            where = f"The artifacts are those of profile {settings.profile} in {deployment.data_dir}."
            advice = "With --profile or another data_dir, what you mean may be found."
            raise CommandError(f"{error}\n{where} {advice}", FAILED) from None
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
        typer.echo(f"{deployment.data_dir} has no run and event storage: versions, runs and staleness are not known")
