"""Quality, judgements and the quality table in Dagster, with and without a truth and a judge that answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.definitions import build_resources
from sbp_assets.settings import ConceptsSource, FilesSource, Judge
from sbp_assets.synthesis import checks, quality_assets
from sbp_assets.synthesis.endpoint import Answer, Ask, Endpoint
from sbp_assets.synthesis.quality import REAL, SYNTHETIC, expected_rows
from sbp_assets.synthesis.questions import Message
from sbp_assets_tests.synthesis.test_judge import FACTUAL, FALSE, KEY, Reply, completion, failure, serve
from sbp_assets_tests.tiny import only, tiny_settings

__all__ = ["serve"]  # a fixture

QUALITY, JUDGEMENTS, TABLE = (["synthesis", name] for name in ("quality", "judgements", "quality_table"))


class Upstream(dg.IOManager):
    """Two shards of three documents of D each, the oracle's besides; the first shard's first synthesis is a copy."""

    def __init__(self, source: ConceptsSource, shard_keys: list[str]) -> None:
        world = ConceptWorld(source)
        self.documents, self.syntheses = {}, {}
        for number, shard in enumerate(shard_keys):
            rows = [world.document(10 * number + n) for n in range(5)]
            documents = pl.DataFrame(rows).select("id", "text", split=pl.Series(["unique"] * 3 + ["oracle"] * 2))
            ids = documents["id"].to_list()
            # The same three texts in both shards: duplicates of each other, none within a shard.
            texts = [rows[0]["text"] if number == 0 else "A text of nothing.", "One.", "Two of them."]
            self.documents[shard] = documents.lazy()
            self.syntheses[shard] = pl.LazyFrame(
                {"id": [f"syn-{seed}-0" for seed in ids[:3]], "seed_id": ids[:3], "text": texts}
            )

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        raise NotImplementedError

    def load_input(self, context: dg.InputContext) -> object:
        values = self.documents if context.asset_key.path[-1] == "documents" else self.syntheses
        return values if len(context.asset_partition_keys) > 1 else values[context.asset_partition_key]


class Agreeable:
    """An endpoint that finds nothing at fault."""

    concurrency = 2

    @contextmanager
    def session(self) -> Iterator[Ask]:
        def ask(messages: Sequence[Message], settings: Judge) -> Answer:
            return Answer(f"Verdict: {'RELATED' if 'Second document' in messages[0]['content'] else 'FACTUAL'}")

        yield ask


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def start(
        truth: bool, judge: Judge | None, url: str | None = None, endpoint: Endpoint | None = None
    ) -> dict[str, Any]:
        """Metadata of the judgements and the table; the table; whether each check passed."""
        changes = {"experiment.synthesis.judge": judge, "deployment.judge_url": url, "deployment.judge_retries": 0}
        source = tiny_settings(tmp_path).experiment.ground_truth
        assert source
        if not truth:
            changes["experiment.corpus.source"] = FilesSource(path="x")
        settings = tiny_settings(tmp_path, changes)
        keys = settings.experiment.shard_keys
        replaced = {"judge_endpoint": endpoint} if endpoint else {}
        parts: dict[str, Any] = {
            "resources": build_resources(settings) | {"upstream": Upstream(source, keys)} | replaced,
            "instance": dg.DagsterInstance.ephemeral(),
        }
        sources = [
            dg.AssetSpec(key, partitions_def=shards(settings)).with_io_manager_key("upstream")
            for key in (["corpus", "documents"], ["synthesis", "synthetic_documents"])
        ]
        everything = [
            *sources,
            *only(quality_assets, checks, settings, "quality", "judgements", "quality_table"),
        ]
        results = [
            dg.materialize(everything, selection=dg.AssetSelection.assets(QUALITY), partition_key=shard, **parts)
            for shard in keys
        ]
        results.append(dg.materialize(everything, selection=dg.AssetSelection.assets(JUDGEMENTS, TABLE), **parts))
        metadata = {
            key[-1]: {
                name: value.value
                for name, value in results[-1].asset_materializations_for_node("__".join(key))[0].metadata.items()
            }
            for key in (JUDGEMENTS, TABLE)
        }
        passed = {e.check_name: e.passed for result in results for e in result.get_asset_check_evaluations()}
        return metadata | {
            "table": pl.read_parquet(tmp_path / "data_dir/synthesis/quality_table.parquet"),
            "passed": passed,
        }

    return start


def keys(table: pl.DataFrame) -> list[tuple[str, ...]]:
    return table.select("metric", "corpus", "method").rows()


def test_concepts_without_a_judge(run: Callable) -> None:
    found = run(truth=True, judge=None)
    table = found["table"]
    assert all(found["passed"].values()) and len(found["passed"]) == 4
    assert keys(table) == expected_rows(True, judged=False)
    metadata = found["quality_table"]
    assert metadata["duplicates_synthetic"] == 2 / 6, "between the shards"
    assert metadata["duplicate_sample_synthetic"] == metadata["duplicate_sample_real"] == 6
    assert metadata["pair_copying_synthetic"] == 1 / 6 and metadata["pair_irrelevance_synthetic"] == 5 / 6
    assert metadata["no_concept_synthetic"] == 5 / 6 and metadata["non_factual_real"] == 0
    assert found["judgements"]["dagster/row_count"] == found["judgements"]["judged"] == 0
    assert "No judge is configured" in found["judgements"]["preview"]


def test_another_corpus_with_a_judge_that_answers_most(run: Callable, serve: Callable) -> None:
    def reply(prompt: str, n: int) -> Reply:
        if "Second document" in prompt:
            return completion("Verdict: UNRELATED")
        return failure(500) if "Two of them" in prompt else FALSE if "nothing" in prompt else FACTUAL

    judge = Judge(model="m", documents=100)
    found = run(truth=False, judge=judge, url=serve(reply).url)
    table, metadata = found["table"], found["judgements"]
    assert keys(table) == expected_rows(False, judged=True)
    assert (metadata["judged"], metadata["unjudged"], metadata["unjudged_http_500"]) == (16, 2, 2)
    assert metadata["prompt_tokens"] == 1400, "equal texts, of two syntheses and of a seed's copy, are asked about once"
    assert found["quality_table"]["non_factual_synthetic_judge"] == 1 / 4
    assert found["quality_table"]["pair_irrelevance_synthetic_judge"] == 1
    rows = {(row["metric"], row["corpus"]): row for row in table.iter_rows(named=True)}
    assert (rows["non_factual", SYNTHETIC]["documents"], rows["non_factual", SYNTHETIC]["sample"]) == (4, 6)
    assert (rows["non_factual", REAL]["value"], rows["non_factual", REAL]["documents"]) == (0, 6)
    assert found["passed"] == {
        "quality_is_valid": True, "judgements_are_valid": True, "quality_table_is_valid": True,
        "judge_answered_most_questions": False,
    }, "two of eighteen have no verdict"  # fmt: skip
    assert KEY not in str(found)

    answered = run(truth=False, judge=judge, url=serve(lambda prompt, n: FACTUAL).url)
    assert answered["judgements"]["resumed"] == 14 and answered["judgements"]["judged"] == 18
    assert answered["passed"]["judge_answered_most_questions"]
    assert answered["quality_table"]["non_factual_synthetic_judge"] == 1 / 6


def test_an_endpoint_is_swapped_as_a_resource(run: Callable) -> None:
    found = run(truth=False, judge=Judge(model="m"), endpoint=Agreeable())
    assert all(found["passed"].values())
    assert (found["judgements"]["judged"], found["judgements"]["unjudged"]) == (18, 0)
    assert set(found["table"].filter(method="judge")["value"].drop_nulls()) == {0}


def test_another_corpus_without_a_judge_has_no_value_instead_of_zero(run: Callable) -> None:
    found = run(truth=False, judge=None)
    assert all(found["passed"].values())
    assert keys(found["table"]) == expected_rows(False, judged=False)
    for row in found["table"].filter(method="judge").iter_rows(named=True):
        assert row["value"] is None and row["documents"] == 0 and "needs a judge" in row["definition"]
    assert not [name for name in found["quality_table"] if name.startswith("non_factual")]


def test_a_judge_that_is_down_stops_nothing(run: Callable, serve: Callable) -> None:
    server = serve(lambda prompt, n: FACTUAL)
    server.close()
    found = run(truth=False, judge=Judge(model="m"), url=server.url)
    assert found["judgements"]["judged"] == 0 and found["judgements"]["unjudged"] == 18
    assert [name for name, passed in found["passed"].items() if not passed] == ["judge_answered_most_questions"]
    values = found["table"].filter(method="judge")
    assert values["value"].null_count() == len(values) and values["sample"].max() == 6
