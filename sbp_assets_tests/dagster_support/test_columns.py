"""Column lineage over the whole graph: every dep is a column that exists, and scores lead back to source files."""

import json
import os
import subprocess
import sys

import dagster as dg
import pytest

from sbp_assets.dagster_support.columns import LINEAGE
from sbp_assets.definitions import defs

GRAPH = defs.resolve_asset_graph()
SCHEMAS = {
    key: [column.name for column in GRAPH.get(key).metadata["dagster/column_schema"].columns]
    for key in GRAPH.toposorted_asset_keys
    if "dagster/column_schema" in GRAPH.get(key).metadata
}
Column = tuple[str, str]


def lineage_of(key: dg.AssetKey) -> dg.TableColumnLineage:
    return GRAPH.get(key).metadata[LINEAGE]


def origins(column: Column) -> set[Column]:
    """Every column that a column is made of, near and far."""
    found: set[Column] = set()
    open_columns = [column]
    while open_columns:
        asset, name = open_columns.pop()
        key = dg.AssetKey(asset.split("/"))
        deps = lineage_of(key).deps_by_column.get(name, []) if LINEAGE in GRAPH.get(key).metadata else []
        new = {(dep.asset_key.to_user_string(), dep.column_name) for dep in deps} - found
        found |= new
        open_columns.extend(new)
    return found


@pytest.mark.parametrize("key", SCHEMAS, ids=dg.AssetKey.to_user_string)
def test_lineage_names_columns_of_declared_inputs(key: dg.AssetKey):
    if not GRAPH.get(key).parent_keys:
        assert LINEAGE not in GRAPH.get(key).metadata
        return
    for column, deps in lineage_of(key).deps_by_column.items():
        assert column in SCHEMAS[key]
        assert deps
        for dep in deps:
            name = dep.asset_key.to_user_string()
            assert dep.asset_key in GRAPH.get(key).parent_keys, f"{column}: {name} is no input"
            assert dep.column_name in SCHEMAS[dep.asset_key], f"{column}: {name}.{dep.column_name}"


def test_a_share_of_the_oracle_gain_leads_back_to_the_source_files():
    chain = [
        ("corpus/source_manifest", "sha256"),
        ("corpus/raw_documents", "text"),
        ("corpus/documents", "text"),
        ("pairing/embeddings", "id"),
        ("pairing/neighbor_candidates", "query_id"),
        ("pairing/neighbor_pairs", "d1"),
        ("synthesizer/checkpoint", "weights"),
        ("synthesis/synthetic_documents", "text"),
        ("synthesis/synthetic_tokens", "tokens"),
        ("pretraining/sbp_model", "weights"),
        ("evaluation/sbp_scores", "value"),
    ]
    assert set(chain) <= origins(("evaluation/comparison", "share_of_oracle_gain"))


def test_a_seed_and_a_pair_lead_back_to_the_document_and_its_file():
    for column in (("synthesis/synthetic_documents", "seed_id"), ("synthesizer/tuning_examples", "d2")):
        assert {("corpus/documents", "id"), ("corpus/source_manifest", "file")} <= origins(column)
    # The synthesizer's examples are chosen by similarity of texts.
    assert ("corpus/documents", "text") in origins(("pairing/neighbor_pairs", "similarity"))


def test_no_score_is_made_of_another_arm():
    baseline = {asset for asset, _ in origins(("evaluation/baseline_scores", "value"))}
    assert not {asset for asset in baseline if asset.startswith(("synthesis/", "synthesizer/", "pairing/"))}


# What a placebo's graph claims, after the test above on all of its assets.
UNDER_OTHER_SETTINGS = """
import json
from sbp_assets_tests.dagster_support import test_columns as here
for key in here.SCHEMAS:
    here.test_lineage_names_columns_of_declared_inputs(key)
print(json.dumps({key.to_user_string(): here.claims(key) for key in here.SCHEMAS if here.GRAPH.get(key).parent_keys}))
"""
CHECKPOINT, TEXT, BUDGET = "synthesizer/checkpoint", "synthesis/synthetic_documents", "pretraining/token_budget"


def claims(key: dg.AssetKey) -> dict[str, list[str]]:
    """The columns that each column is made of, as "stage/asset.column"."""
    return {
        column: sorted(f"{dep.asset_key.to_user_string()}.{dep.column_name}" for dep in deps)
        for column, deps in lineage_of(key).deps_by_column.items()
    }


def test_lineage_claims_nothing_that_the_settings_leave_unread():
    made = {key.to_user_string(): claims(key) for key in SCHEMAS if GRAPH.get(key).parent_keys}
    assert made[CHECKPOINT]["weights"] == ["pretraining/baseline_model.weights", "synthesizer/tuning_examples.tokens"]
    assert made[TEXT]["text"] == ["corpus/tokens.tokens", "synthesizer/checkpoint.weights"]
    read = ["corpus/tokens.tokens", "synthesis/synthetic_tokens.tokens"]
    assert made[BUDGET]["flops"] == [*read, "synthesizer/checkpoint.tokens"]
    placebo = {"SBP_EXPERIMENT__SYNTHESIS__CONDITION": "none", "SBP_EXPERIMENT__SYNTHESIZER__START": "scratch"}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_OTHER_SETTINGS], env=os.environ | placebo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made[CHECKPOINT]["weights"] == ["synthesizer/tuning_examples.tokens"]
    assert made[TEXT]["text"] == ["pretraining/baseline_model.weights"]
    assert made[BUDGET]["flops"] == read


def test_column_descriptions_say_what_a_column_is_made_of():
    schema = GRAPH.get(dg.AssetKey(["pairing", "neighbor_pairs"])).metadata["dagster/column_schema"]
    described = {column.name: column.description for column in schema.columns}
    assert "← " in described["d1"] and "pairing/neighbor_candidates.query_id" in described["d1"]
    without = {name for key in SCHEMAS for name in SCHEMAS[key]} - {
        name for key in SCHEMAS if LINEAGE in GRAPH.get(key).metadata for name in lineage_of(key).deps_by_column
    }
    assert "rollout" in without  # a counter is made of no column
