"""The corpus stage materialises through Dagster on the tiny profile, and every check passes."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from sbp_assets.corpus import assets, checks
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.definitions import build_resources
from sbp_assets_tests.tiny import tiny_settings

STEPS: tuple[tuple[bool, tuple[str, ...]], ...] = (
    (False, ("source_manifest",)),
    (True, ("raw_documents", "rejected_rows", "minhash_signatures")),
    (False, ("duplicates",)),
    (True, ("documents",)),
    (False, ("tokenizer",)),
    (True, ("tokens",)),
)


def test_the_stage_materialises_and_every_check_passes(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    defined = load_checks(checks, settings)
    members = [*load_assets(assets, settings), *defined]
    evaluated = {}
    with dg.DagsterInstance.ephemeral() as instance:
        for sharded, names in STEPS:
            for shard in settings.experiment.shard_keys if sharded else [None]:
                result = dg.materialize(
                    members,
                    selection=dg.AssetSelection.assets(*(["corpus", name] for name in names)),
                    partition_key=shard,
                    resources=build_resources(settings),
                    instance=instance,
                )
                evaluated |= {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
    assert all(evaluated.values()), evaluated
    assert evaluated.keys() == {spec.name for check in defined for spec in check.check_specs}
