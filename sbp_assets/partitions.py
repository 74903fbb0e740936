"""The active settings, and the partitions they define: corpus shards and training seeds."""

import warnings

import dagster as dg

from sbp_assets.settings import load_settings

# Partitioned checks, sensors that evaluate conditions of one's own and a hook that Pipes itself calls are marked
# preview or beta in Dagster 1.13; the version is pinned and the tests run on it.
warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")
warnings.filterwarnings("ignore", message="Parameter `use_user_code_server`")
warnings.filterwarnings("ignore", message="Function `PipesMessageReader.expected_writer_count`")

SETTINGS = load_settings()
EXPERIMENT = SETTINGS.experiment
DEPLOYMENT = SETTINGS.deployment

SHARDS = dg.StaticPartitionsDefinition(EXPERIMENT.shard_keys)
SEEDS = dg.StaticPartitionsDefinition(EXPERIMENT.seed_keys)

ALL = dg.AllPartitionMapping()
FIRST_SEED = dg.SpecificPartitionsPartitionMapping([EXPERIMENT.seed_keys[0]])

# What synthesis samples from: the unconditional placebo takes the synthesizer's starting point itself.
SAMPLED_MODEL = (
    dg.AssetIn(["synthesizer", "checkpoint"])
    if EXPERIMENT.conditional
    else dg.AssetIn(["pretraining", "baseline_model"], partition_mapping=FIRST_SEED)
)
