"""The corpus stage materialises through Dagster on the tiny profile, and every check passes."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets_tests.tiny import tiny_settings


def test_the_stage_materialises_and_every_check_passes(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    defs = build_definitions(settings)
    evaluations: list[dg.AssetCheckEvaluation] = []
    with dg.DagsterInstance.ephemeral() as instance:
        for step in PIPELINE:
            if step.keys[0].path[0] == "corpus":
                job = defs.resolve_job_def(step.name)
                for shard in settings.experiment.shard_keys if job.partitions_def else [None]:
                    result = job.execute_in_process(instance=instance, partition_key=shard)
                    evaluations += result.get_asset_check_evaluations()
    assert [evaluation for evaluation in evaluations if not evaluation.passed] == []
    checks = defs.resolve_asset_graph().asset_check_keys
    assert {e.asset_check_key for e in evaluations} == {key for key in checks if key.asset_key.path[0] == "corpus"}
