"""The pipeline at a glance: the stages in the order data flows through them, with their resources and automation."""

import warnings
from collections.abc import Mapping
from typing import Any

import dagster as dg

import sbp_assets.corpus.assets
import sbp_assets.corpus.checks
import sbp_assets.evaluation.assets
import sbp_assets.evaluation.checks
import sbp_assets.evaluation.filter_assets
import sbp_assets.pairing.assets
import sbp_assets.pairing.checks
import sbp_assets.pretraining.assets
import sbp_assets.pretraining.checks
import sbp_assets.report.assets
import sbp_assets.report.checks
import sbp_assets.synthesis.assets
import sbp_assets.synthesis.checks
import sbp_assets.synthesis.quality_assets
import sbp_assets.synthesizer.assets
import sbp_assets.synthesizer.checks
from sbp_assets.dagster_support.partitions import key_blocks, shards
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.fan_out import open_engine
from sbp_assets.orchestration.nightly import NightlyAutomation, policies_of
from sbp_assets.orchestration.pipeline import display_logger, pipeline_of
from sbp_assets.orchestration.sensors import failure_sensor, source_sensor, unchecked_sensor
from sbp_assets.orchestration.shard_step import with_shard_steps
from sbp_assets.pairing.embed import Embedder
from sbp_assets.settings import FilesSource, Settings, load_settings
from sbp_assets.storage.checks import stored_checks
from sbp_assets.storage.io_managers import ArtifactStore
from sbp_assets.synthesis.endpoint import OpenAIEndpoint
from sbp_assets.synthesis.engine import Generator
from sbp_assets.training.trainer import LocalTrainer

# In the order data flows through them.
ASSETS = [
    sbp_assets.corpus.assets,
    sbp_assets.pairing.assets,
    sbp_assets.pretraining.assets,
    sbp_assets.synthesizer.assets,
    sbp_assets.synthesis.assets,
    sbp_assets.synthesis.quality_assets,
    sbp_assets.evaluation.filter_assets,
    sbp_assets.evaluation.assets,
    sbp_assets.report.assets,
]
CHECKS = [
    sbp_assets.corpus.checks,
    sbp_assets.pairing.checks,
    sbp_assets.pretraining.checks,
    sbp_assets.synthesizer.checks,
    sbp_assets.synthesis.checks,
    sbp_assets.evaluation.checks,
    sbp_assets.report.checks,
]


def build_resources(settings: Settings) -> dict[str, Any]:
    """Return what the assets work with, by resource key.

    Embedder and generator hold engines, and `fan_out` a connection to a cluster, until they are closed.
    """
    return {
        "settings": settings,
        **ArtifactStore(settings.deployment).resources,
        "fan_out": open_engine(settings),
        "embedder": Embedder(),
        "trainer": LocalTrainer(),
        "generator": Generator(),
        "judge_endpoint": OpenAIEndpoint.of(settings.deployment),
    }


def build_definitions(settings: Settings, resources: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Return the code location for `settings`; each of `resources` replaces the one of its key in `build_resources`."""
    deployment, source = settings.deployment, settings.experiment.corpus.source
    steps = pipeline_of(settings)
    nightly = NightlyAutomation(deployment, policies=policies_of(steps))
    with warnings.catch_warnings():
        # Partitioned checks and sensors that evaluate conditions of our own are marked preview or beta in Dagster 1.13;
        # the version is pinned and the tests run on it.
        warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")
        warnings.filterwarnings("ignore", message="Parameter `use_user_code_server`")
        assets = [asset for module in ASSETS for asset in load_assets(module, settings)]
        checks = [check for module in CHECKS for check in load_checks(module, settings)] + stored_checks(assets)
        assets, checks = with_shard_steps(
            assets, checks, (shards(settings), key_blocks(settings)), deployment.shards_per_run, steps
        )
        sensors = [nightly.sensor(), unchecked_sensor(deployment, nightly.cache, steps), failure_sensor(deployment)]
        if isinstance(source, FilesSource):
            sensors.append(source_sensor(source, deployment))
    return dg.Definitions(
        assets=nightly.automate(assets),
        asset_checks=checks,
        jobs=[step.job for step in steps],
        sensors=sensors,
        # In one process, so that an engine loaded for one asset serves the next, and its checks.
        executor=dg.in_process_executor,
        loggers={"console": dg.colored_console_logger, "display": display_logger},
        resources={**build_resources(settings), **(resources or {})},
    )


@dg.definitions
def defs() -> dg.Definitions:
    """Return the code location for the settings of $SBP_PROFILE and the environment, read when Dagster loads it."""
    return build_definitions(load_settings())
