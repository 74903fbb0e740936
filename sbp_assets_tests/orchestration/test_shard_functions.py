import dagster as dg

from sbp_assets.orchestration.shard_functions import asset_function

SHARDS = dg.StaticPartitionsDefinition(["00000", "00001"])


@dg.asset(partitions_def=SHARDS)
def documents() -> str:
    return "documents"


def tokens_of(*ins: str) -> dg.AssetsDefinition:
    @dg.asset(partitions_def=SHARDS, ins={name: dg.AssetIn(name) for name in ins})
    def tokens(
        context: dg.AssetExecutionContext, settings: dg.ResourceParam[str], documents: str, **decisions: str
    ) -> str:
        return documents

    return tokens


def test_inputs_that_only_some_settings_have_are_no_resources():
    upstream = {spec.key: (asset, spec) for asset in (documents,) for spec in asset.specs}
    found = asset_function(tokens_of("documents"), upstream, SHARDS)
    assert (list(found.inputs), list(found.resources), found.takes_context) == (["documents"], ["settings"], True)

    upstream[dg.AssetKey("decisions_of_all")] = documents, next(iter(documents.specs))
    found = asset_function(tokens_of("documents", "decisions_of_all"), upstream, SHARDS)
    assert set(found.inputs) == {"documents", "decisions_of_all"} and list(found.resources) == ["settings"]
