"""Column lineage over the whole graph: every dep is a column that exists, and scores lead back to source files."""

from pathlib import Path

import dagster as dg
import pytest

from sbp_assets.definitions import build_definitions
from sbp_assets.settings import Settings, load_settings
from sbp_assets.storage.column_metadata import LINEAGE
from sbp_assets_tests.tiny import tiny_settings

Column = tuple[str, str]


class Lineage:
    """What the asset graph under some settings says of columns."""

    def __init__(self, settings: Settings) -> None:
        self.graph = build_definitions(settings).resolve_asset_graph()
        self.columns = {
            key: [column.name for column in self.graph.get(key).metadata["dagster/column_schema"].columns]
            for key in self.graph.toposorted_asset_keys
            if "dagster/column_schema" in self.graph.get(key).metadata
        }

    def of(self, key: dg.AssetKey) -> dg.TableColumnLineage:
        return self.graph.get(key).metadata[LINEAGE]

    def sources(self, asset: str) -> dict[str, list[str]]:
        """The columns that each column of "stage/asset" is made of, as "stage/asset.column"."""
        return {
            column: sorted(f"{dep.asset_key.to_user_string()}.{dep.column_name}" for dep in deps)
            for column, deps in self.of(dg.AssetKey(asset.split("/"))).deps_by_column.items()
        }

    def origins(self, column: Column) -> set[Column]:
        """Every column that a column is made of, near and far."""
        found: set[Column] = set()
        open_columns = [column]
        while open_columns:
            asset, name = open_columns.pop()
            key = dg.AssetKey(asset.split("/"))
            deps = self.of(key).deps_by_column.get(name, []) if LINEAGE in self.graph.get(key).metadata else []
            new = {(dep.asset_key.to_user_string(), dep.column_name) for dep in deps} - found
            found |= new
            open_columns.extend(new)
        return found

    def check_names(self, key: dg.AssetKey) -> None:
        """Every column named is one of the asset's, or of an input that it declares."""
        if not self.graph.get(key).parent_keys:
            assert LINEAGE not in self.graph.get(key).metadata
            return
        for column, deps in self.of(key).deps_by_column.items():
            assert column in self.columns[key]
            assert deps
            for dep in deps:
                name = dep.asset_key.to_user_string()
                assert dep.asset_key in self.graph.get(key).parent_keys, f"{column}: {name} is no input"
                assert dep.column_name in self.columns[dep.asset_key], f"{column}: {name}.{dep.column_name}"


TINY = Lineage(load_settings("tiny", {}))


@pytest.mark.parametrize("key", TINY.columns, ids=dg.AssetKey.to_user_string)
def test_lineage_names_columns_of_declared_inputs(key: dg.AssetKey):
    TINY.check_names(key)


def test_a_share_of_the_oracle_gain_leads_back_to_the_source_files():
    chain = [
        ("corpus/source_manifest", "sha256"),
        ("corpus/raw_documents", "text"),
        ("corpus/documents", "text"),
        ("pairing/embeddings", "id"),
        ("pairing/partial_candidates", "query_id"),
        ("pairing/neighbor_candidates", "query_id"),
        ("pairing/neighbor_edges", "d1"),
        ("pairing/neighbor_pairs", "d1"),
        ("synthesizer/checkpoint", "weights"),
        ("synthesis/synthetic_documents", "text"),
        ("synthesis/synthetic_tokens", "tokens"),
        ("pretraining/sbp_model", "weights"),
        ("evaluation/sbp_scores", "value"),
    ]
    assert set(chain) <= TINY.origins(("evaluation/comparison", "share_of_oracle_gain"))


def test_a_seed_and_a_pair_lead_back_to_the_document_and_its_file():
    for column in (("synthesis/synthetic_documents", "seed_id"), ("synthesizer/tuning_examples", "d2")):
        assert {("corpus/documents", "id"), ("corpus/source_manifest", "file")} <= TINY.origins(column)
    # The synthesizer's examples are chosen by similarity of texts.
    assert ("corpus/documents", "text") in TINY.origins(("pairing/neighbor_pairs", "similarity"))


def test_no_score_is_made_of_another_arm():
    baseline = {asset for asset, _ in TINY.origins(("evaluation/baseline_scores", "value"))}
    assert not {asset for asset in baseline if asset.startswith(("synthesis/", "synthesizer/", "pairing/"))}


CHECKPOINT, TEXT, BUDGET = "synthesizer/checkpoint", "synthesis/synthetic_documents", "pretraining/token_budget"


def test_lineage_claims_nothing_that_the_settings_leave_unread(tmp_path: Path):
    assert TINY.sources(CHECKPOINT)["weights"] == [
        "pretraining/baseline_model.weights",
        "synthesizer/tuning_examples.tokens",
    ]
    assert TINY.sources(TEXT)["text"] == ["corpus/tokens.tokens", "synthesizer/checkpoint.weights"]
    read = ["corpus/tokens.tokens", "synthesis/synthetic_tokens.tokens"]
    assert TINY.sources(BUDGET)["flops"] == [*read, "synthesizer/checkpoint.tokens"]
    changes = {"experiment.synthesis.condition": "none", "experiment.synthesizer.start": "scratch"}
    placebo = Lineage(tiny_settings(tmp_path, changes))
    for key in placebo.columns:
        placebo.check_names(key)
    assert placebo.sources(CHECKPOINT)["weights"] == ["synthesizer/tuning_examples.tokens"]
    assert placebo.sources(TEXT)["text"] == ["pretraining/baseline_model.weights"]
    assert placebo.sources(BUDGET)["flops"] == read
    pairs = Lineage(tiny_settings(tmp_path, {"experiment.synthesis.condition": "pairs"}))
    for key in pairs.columns:
        pairs.check_names(key)
    assert pairs.sources(TEXT)["text"] == ["synthesizer/tuning_examples.tokens"]
    assert pairs.sources(BUDGET)["flops"] == read


def test_column_descriptions_say_what_a_column_is_made_of():
    schema = TINY.graph.get(dg.AssetKey(["pairing", "neighbor_pairs"])).metadata["dagster/column_schema"]
    described = {column.name: column.description for column in schema.columns}
    assert "← " in described["d1"] and "pairing/neighbor_edges.d1" in described["d1"]
    without = {name for key in TINY.columns for name in TINY.columns[key]} - {
        name for key in TINY.columns if LINEAGE in TINY.graph.get(key).metadata for name in TINY.of(key).deps_by_column
    }
    assert "rollout" in without  # a counter is made of no column
