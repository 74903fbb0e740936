"""A corpus that grows: `sbp run` materialises the new shards, and nothing that has not changed."""

import json
from pathlib import Path

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.settings import ConceptsSource
from sbp_assets_tests.operations.deployment import Deployment

SHARD_DOCUMENTS = 150


def write_file(corpus: Path, number: int) -> None:
    world = ConceptWorld(
        ConceptsSource(documents=10 * SHARD_DOCUMENTS, concepts=12, attributes=4, facts_per_document=2)
    )
    rows = [world.document(number * SHARD_DOCUMENTS + index) for index in range(SHARD_DOCUMENTS)]
    (corpus / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def partitions_run(deployment: Deployment, earlier: set[str]) -> set[tuple[str, str | None]]:
    with deployment.instance() as instance:
        runs = [run for run in instance.get_runs() if run.run_id not in earlier]
        earlier.update(run.run_id for run in runs)
    first, last = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
    found = {(run.job_name, run.tags.get("dagster/partition")) for run in runs if first not in run.tags}
    for run in runs:
        if first in run.tags:
            shards = range(int(run.tags[first]), int(run.tags[last]) + 1)
            found |= {(run.job_name, f"{number:05d}") for number in shards}
    return found


def test_a_corpus_that_grows_materialises_only_what_is_new_or_changed(tmp_path: Path):
    corpus, earlier = tmp_path / "corpus", set[str]()
    corpus.mkdir()
    for number in range(2):
        write_file(corpus, number)
    source = {"kind": "files", "path": str(corpus), "files_per_shard": 1}
    with Deployment(tmp_path, {"SBP_EXPERIMENT__CORPUS__SOURCE": json.dumps(source)}) as deployment:
        deployment.sbp("run", "--until", "split")
        shards = {(step, shard) for step in ("ingest", "split") for shard in ("00000", "00001")}
        assert partitions_run(deployment, earlier) == {("manifest", None), ("deduplicate", None), *shards}

        write_file(corpus, 2)
        deployment.overrides["SBP_EXPERIMENT__CORPUS__SHARDS"] = "3"
        deployment.sbp("run", "--until", "split")
        assert partitions_run(deployment, earlier) == {
            ("manifest", None), ("ingest", "00002"), ("deduplicate", None), ("split", "00002"),
        }  # fmt: skip

        # The document that a shard repeats is dropped there: that shard alone is split again.
        first = (corpus / "part-0.jsonl").read_text().splitlines()[0]
        with (corpus / "part-1.jsonl").open("a") as file:
            file.write(json.dumps({**json.loads(first), "id": "repeated"}) + "\n")
        deployment.sbp("run", "--refresh", "--until", "split")
        assert partitions_run(deployment, earlier) == {
            ("manifest", None), ("ingest", "00001"), ("deduplicate", None), ("split", "00001"),
        }  # fmt: skip
