"""The whole stage through Dagster on the tiny profile, every check green, over IO-managed artifacts."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from sbp_assets.corpus import assets, checks
from sbp_assets.partitions import EXPERIMENT
from sbp_assets.storage.io_managers import DirectoryIOManager, ParquetIOManager

STEPS: tuple[tuple[bool, tuple[str, ...]], ...] = (
    (False, ("source_manifest",)),
    (True, ("raw_documents", "rejected_rows", "minhash_signatures")),
    (False, ("duplicates",)),
    (True, ("documents",)),
    (False, ("tokenizer",)),
    (True, ("tokens",)),
)


def test_the_stage_materialises_with_every_check_green(tmp_path: Path) -> None:
    managers = {"parquet": ParquetIOManager, "directory": DirectoryIOManager}
    resources = {key: manager(str(tmp_path / "data"), str(tmp_path / "cache")) for key, manager in managers.items()}
    defined = dg.load_asset_checks_from_modules([checks])
    members = [*dg.load_assets_from_modules([assets]), *defined]
    evaluated = {}
    with dg.DagsterInstance.ephemeral() as instance:
        for sharded, names in STEPS:
            for shard in EXPERIMENT.shard_keys if sharded else [None]:
                result = dg.materialize(
                    members,
                    selection=dg.AssetSelection.assets(*(["corpus", name] for name in names)),
                    partition_key=shard,
                    resources=resources,
                    instance=instance,
                )
                evaluated |= {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
    assert all(evaluated.values()), evaluated
    assert evaluated.keys() == {spec.name for check in defined for spec in check.check_specs}
