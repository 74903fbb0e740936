import dagster as dg

from sbp_assets.orchestration.shard_functions import asset_function

SHARDS = dg.StaticPartitionsDefinition(["00000", "00001"])


@dg.asset(partitions_def=SHARDS)
def documents() -> str:
    return "documents"


@dg.asset(partitions_def=SHARDS)
def decisions() -> str:
    return "decisions"


def tokens_of(*ins: str) -> dg.AssetsDefinition:
    @dg.asset(partitions_def=SHARDS, ins={name: dg.AssetIn(name) for name in ins})
    def tokens(
        context: dg.AssetExecutionContext, settings: dg.ResourceParam[str], documents: str, **filtered_by: str
    ) -> str:
        return documents

    return tokens


def test_inputs_that_only_some_settings_have_are_no_resources():
    upstream = {spec.key: (asset, spec) for asset in (documents, decisions) for spec in asset.specs}
    for inputs in (["documents"], ["documents", "decisions"]):
        found = asset_function(tokens_of(*inputs), upstream, SHARDS)
        assert set(found.inputs) == set(inputs)
        assert list(found.resources) == ["settings"] and found.takes_context
