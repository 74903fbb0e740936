"""What is true of all checks, and that docs/checks.md says it."""

from pathlib import Path

import dagster as dg

from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
from sbp_assets.storage.checks import NAME as STORED
from sbp_assets_tests.operations.damage import DAMAGES, table_of_checks, table_of_damage

GRAPH = build_definitions(load_settings("tiny")).resolve_asset_graph()
DOCS = (Path(__file__).parents[1] / "docs/checks.md").read_text(encoding="utf-8")


def test_the_docs_list_every_check_and_every_damage():
    assert table_of_checks() in DOCS, "SBP_PROFILE=tiny python -m sbp_assets_tests.operations.damage prints the tables"
    assert table_of_damage() in DOCS, "SBP_PROFILE=tiny python -m sbp_assets_tests.operations.damage prints the tables"


def test_every_artifact_is_read_back_and_looked_into():
    for asset in GRAPH.get_all_asset_keys():
        checks = [GRAPH.get(key) for key in GRAPH.asset_check_keys if key.asset_key == asset]
        assert any(check.key.name == STORED and check.blocking for check in checks), asset
        assert any(check.key.name != STORED for check in checks), asset


def test_every_check_can_run_alone_on_its_own_partition():
    for key in GRAPH.asset_check_keys:
        assert isinstance(GRAPH.assets_def_for_key(key), dg.AssetChecksDefinition), key
        assert GRAPH.get(key).partitions_def == GRAPH.get(key.asset_key).partitions_def, key


def test_whatever_is_made_of_an_artifact_waits_for_a_check_of_its_content():
    for asset in GRAPH.get_all_asset_keys():
        blocking = [key.name for key in GRAPH.asset_check_keys if key.asset_key == asset and GRAPH.get(key).blocking]
        if GRAPH.get(asset).child_keys:
            # Rejected rows are counted by a check of the documents, with which they are made.
            assert set(blocking) > {STORED} or asset.path[-1] == "rejected_rows", asset


def test_damages_name_checks_that_exist():
    checks = {key.to_user_string() for key in GRAPH.asset_check_keys}
    assert {damage.check for damage in DAMAGES} <= checks
