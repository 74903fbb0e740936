"""The active settings, and the partitions they define: corpus shards and training seeds."""

import warnings

import dagster as dg

from sbp_assets.experiment import load_settings

# Partitioned checks are marked preview in Dagster 1.13; the pinned version is the one the tests run on.
warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")

SETTINGS = load_settings()
EXPERIMENT = SETTINGS.experiment
DEPLOYMENT = SETTINGS.deployment

SHARDS = dg.StaticPartitionsDefinition(EXPERIMENT.shard_keys)
SEEDS = dg.StaticPartitionsDefinition(EXPERIMENT.seed_keys)

ALL = dg.AllPartitionMapping()
FIRST_SEED = dg.SpecificPartitionsPartitionMapping([EXPERIMENT.seed_keys[0]])
