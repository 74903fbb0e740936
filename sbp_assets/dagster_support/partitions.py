"""The partitionings of the pipeline: by corpus shard, by block of keys and by training seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.stage import ForSettings, for_settings
from sbp_assets.settings import Settings

# A fan-in: every partition of the input.
ALL = dg.AllPartitionMapping()


def shards(settings: Settings) -> dg.StaticPartitionsDefinition:
    """Return the partitions of an asset that exists once per corpus shard: '00000', '00001', …"""
    return _static(tuple(settings.experiment.shard_keys))


def key_blocks(settings: Settings) -> dg.StaticPartitionsDefinition:
    """Return the partitions of an asset that exists once per block of keys: '00000', …"""
    return _static(tuple(settings.experiment.block_keys))


def seeds(settings: Settings) -> dg.StaticPartitionsDefinition:
    """Return the partitions of an asset that exists once per training seed: '0', …"""
    return _static(tuple(settings.experiment.seed_keys))


def first_seed(settings: Settings) -> dg.SpecificPartitionsPartitionMapping:
    """Return the mapping that reads one partition of a per-seed asset: that of the first seed."""
    return dg.SpecificPartitionsPartitionMapping([settings.experiment.seed_keys[0]])


def shard_check(**arguments: Any) -> Callable[[Callable[..., Any]], ForSettings[dg.AssetChecksDefinition]]:
    """Return the decorator of a check that runs once per corpus shard: `dg.asset_check` with these arguments."""
    return for_settings(lambda settings: dg.asset_check(partitions_def=shards(settings), **arguments))


@lru_cache(maxsize=6)
def _static(keys: tuple[str, ...]) -> dg.StaticPartitionsDefinition:
    # One object for all assets: Dagster compares the keys of two definitions, and there may be 100,000.
    return dg.StaticPartitionsDefinition(keys)
