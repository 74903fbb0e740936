"""The pipeline at a glance: the stages in the order data flows through them, with their resources and automation."""

from datetime import timedelta

import dagster as dg

import sbp_assets.corpus.assets
import sbp_assets.corpus.checks
import sbp_assets.evaluation.assets
import sbp_assets.evaluation.checks
import sbp_assets.pairing.assets
import sbp_assets.pairing.checks
import sbp_assets.pretraining.assets
import sbp_assets.pretraining.checks
import sbp_assets.synthesis.assets
import sbp_assets.synthesis.checks
import sbp_assets.synthesizer.assets
import sbp_assets.synthesizer.checks
from sbp_assets.dagster_support.columns import with_sources
from sbp_assets.orchestration.nightly import NIGHTLY, NightlyAutomation
from sbp_assets.orchestration.pipeline import JOBS, NightlyPolicy, display_logger
from sbp_assets.orchestration.sensors import failure_sensor, source_sensor, unchecked_sensor
from sbp_assets.partitions import DEPLOYMENT, EXPERIMENT
from sbp_assets.settings import FilesSource
from sbp_assets.storage.checks import stored_checks
from sbp_assets.storage.io_managers import ArtifactIOManager, DirectoryIOManager, ParquetIOManager
from sbp_assets.training.launch import ENDING_SECONDS
from sbp_assets.training.pipes import WholeLinesMessageReader

STAGES = [
    sbp_assets.corpus,
    sbp_assets.pairing,
    sbp_assets.pretraining,
    sbp_assets.synthesizer,
    sbp_assets.synthesis,
    sbp_assets.evaluation,
]


def io_managers(data_dir: str) -> dict[str, ArtifactIOManager]:
    """Of the artifact store `data_dir`, by resource key."""
    storage = (data_dir, f"{DEPLOYMENT.work_dir}/cache", DEPLOYMENT.cache_gb, DEPLOYMENT.storage_patience)
    return {"parquet": ParquetIOManager(*storage), "directory": DirectoryIOManager(*storage)}


RESOURCES = {
    **io_managers(DEPLOYMENT.data_dir),
    "pipes": dg.PipesSubprocessClient(
        message_reader=WholeLinesMessageReader(), termination_timeout_seconds=ENDING_SECONDS + 20
    ),
}

ASSETS = [
    asset
    for asset in dg.load_assets_from_modules([stage.assets for stage in STAGES])
    if isinstance(asset, dg.AssetsDefinition)
]


def artifact_managers(data_dir: str) -> dict[dg.AssetKey, ArtifactIOManager]:
    """What reads and writes each asset's artifacts in the store `data_dir`."""
    managers = io_managers(data_dir)
    return {key: managers[asset.get_io_manager_key_for_asset_key(key)] for asset in ASSETS for key in asset.keys}


NIGHTLY_AUTOMATION = NightlyAutomation(DEPLOYMENT)
PARTITIONED = {spec.key for asset in ASSETS for spec in asset.specs if spec.partitions_def}


def _house_rules(spec: dg.AssetSpec) -> dg.AssetSpec:
    spec = spec.replace_attributes(owners=list(DEPLOYMENT.owners), metadata=with_sources(spec.metadata))
    joins_shards = spec.partitions_def is None and any(dep.asset_key in PARTITIONED for dep in spec.deps)
    if joins_shards and NIGHTLY.get(spec.key) is NightlyPolicy.IF_NEEDED and DEPLOYMENT.overdue_days:
        window = timedelta(days=DEPLOYMENT.overdue_days)
        spec = spec.replace_attributes(freshness_policy=dg.FreshnessPolicy.time_window(fail_window=window))
    return NIGHTLY_AUTOMATION.with_condition(spec)


SENSORS = [
    NIGHTLY_AUTOMATION.sensor(),
    unchecked_sensor(DEPLOYMENT, NIGHTLY_AUTOMATION.cache),
    failure_sensor(DEPLOYMENT),
]
if isinstance(EXPERIMENT.corpus.source, FilesSource):
    SENSORS.append(source_sensor(EXPERIMENT.corpus.source, DEPLOYMENT))

defs = dg.Definitions(
    assets=[asset.map_asset_specs(_house_rules) for asset in ASSETS],
    asset_checks=[
        *dg.load_asset_checks_from_modules([stage.checks for stage in STAGES]),
        *stored_checks(ASSETS),
    ],
    jobs=JOBS,
    sensors=SENSORS,
    # In one process, so that an engine loaded for one asset serves the next, and its checks.
    executor=dg.in_process_executor,
    loggers={"console": dg.colored_console_logger, "display": display_logger},
    resources=RESOURCES,
)
