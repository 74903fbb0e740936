"""What is true of all checks, and that docs/checks.md says it."""

import dagster as dg
import pytest

from sbp_assets.dagster_support.internals import BaseAssetGraph
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
from sbp_assets.storage.checks import NAME as STORED
from sbp_assets_tests.operations.damage import DAMAGES, PAGE, table_of_checks, table_of_damage

HINT = "`python -m sbp_assets_tests.operations.damage --write` rewrites the tables of docs/checks.md"


@pytest.fixture(scope="module")
def graph() -> BaseAssetGraph:
    return build_definitions(load_settings("tiny", {})).resolve_asset_graph()


def test_the_docs_list_every_check_and_every_damage():
    page = PAGE.read_text(encoding="utf-8")
    assert table_of_checks() in page, HINT
    assert table_of_damage() in page, HINT


def test_every_artifact_has_the_integrity_check_and_a_check_of_its_content(graph: BaseAssetGraph):
    for asset in graph.get_all_asset_keys():
        checks = [graph.get(key) for key in graph.asset_check_keys if key.asset_key == asset]
        assert any(check.key.name == STORED and check.blocking for check in checks), asset
        assert any(check.key.name != STORED for check in checks), asset


def test_every_check_can_run_alone_on_its_own_partition(graph: BaseAssetGraph):
    for key in graph.asset_check_keys:
        definition = graph.assets_def_for_key(key)
        assert isinstance(definition, dg.AssetChecksDefinition) or definition.can_subset, key
        own, of_asset = graph.get(key).partitions_def, graph.get(key.asset_key).partitions_def
        if own is None and of_asset is not None:  # of all shards together: it would hold up every one of them
            assert not graph.get(key).blocking and key.name.endswith("_over_all_shards"), key
        else:
            assert own == of_asset, key


def test_assets_downstream_wait_for_a_check_of_the_artifacts_content(graph: BaseAssetGraph):
    for asset in graph.get_all_asset_keys():
        blocking = [key.name for key in graph.asset_check_keys if key.asset_key == asset and graph.get(key).blocking]
        if graph.get(asset).child_keys:
            # Rejected rows are counted by a check of the documents, which are materialised with them.
            assert set(blocking) > {STORED} or asset.path[-1] == "rejected_rows", asset


def test_damages_name_checks_that_exist(graph: BaseAssetGraph):
    checks = {key.to_user_string() for key in graph.asset_check_keys}
    assert {damage.check for damage in DAMAGES} <= checks
