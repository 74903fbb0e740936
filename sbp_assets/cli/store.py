"""What commands ask of the artifact store before they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sbp_assets.cli.errors import CommandError
from sbp_assets.settings import Deployment

if TYPE_CHECKING:
    import dagster as dg

    from sbp_assets.orchestration.staleness import Staleness


def require_store(defs: dg.Definitions, staleness: Staleness, deployment: Deployment) -> None:
    """Raise CommandError where artifacts are recorded as materialised and the store has none of them.

    Then it is another store, by a mistyped setting or a disk that is not mounted. One partition of each asset is looked
    for.
    """
    from sbp_assets.dagster_support.stage import io_manager_keys
    from sbp_assets.orchestration.pipeline import pipeline_among
    from sbp_assets.storage.io_managers import ArtifactStore

    managers = ArtifactStore(deployment).managers(io_manager_keys(defs))
    pipeline = pipeline_among(defs.resolve_asset_graph().get_all_asset_keys())
    recorded = [(key, name) for step in pipeline for key in step.keys for name in [*staleness.versions(key)][:1]]
    try:
        there = any(managers[key].etag(key, name) for key, name in recorded)
    except RuntimeError as error:  # the store cannot be reached
        raise CommandError(str(error)) from None
    if recorded and not there:
        raise CommandError(
            f"{deployment.data_dir} holds none of the artifacts that the run and event storage knows; is it the right "
            f"data_dir? To materialise everything again there, name another instance_dir than {deployment.instance_dir}"
        )
