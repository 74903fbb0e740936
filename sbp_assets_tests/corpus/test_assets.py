"""The corpus stage materialises through Dagster on the tiny profile, and every check passes."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from sbp_assets.corpus import assets
from sbp_assets.dagster_support.preview import unescape
from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets.settings import FilesSource, Settings
from sbp_assets_tests.tiny import tiny_settings


def test_the_stage_materialises_and_every_check_passes(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    defs = build_definitions(settings)
    evaluations: list[dg.AssetCheckEvaluation] = []
    with dg.DagsterInstance.ephemeral() as instance:
        for step in PIPELINE:
            if step.keys[0].path[0] == "corpus":
                job = defs.resolve_job_def(step.name)
                for shard in settings.experiment.shard_keys if job.partitions_def else [None]:
                    result = job.execute_in_process(instance=instance, partition_key=shard)
                    evaluations += result.get_asset_check_evaluations()
        (store := Path(settings.deployment.work_dir) / "similarities/of-other-shingles.parquet").touch()
        again = defs.resolve_job_def("deduplicate").execute_in_process(instance=instance)
    assert [evaluation for evaluation in evaluations if not evaluation.passed] == []
    (duplicates,) = again.asset_materializations_for_node("corpus__duplicates")
    counts = duplicates.metadata
    assert counts["candidate_pairs"].value > counts["compared_pairs"].value == 0
    assert len([*store.parent.iterdir()]) == 1 and not store.exists()
    checks = defs.resolve_asset_graph().asset_check_keys
    assert {e.asset_check_key for e in evaluations} == {key for key in checks if key.asset_key.path[0] == "corpus"}


def ingested(settings: Settings) -> tuple[list[dg.AssetCheckEvaluation], dg.ExecuteInProcessResult]:
    """Run the stage up to the duplicates; return all evaluations, and the result of the first run that failed."""
    defs = build_definitions(settings)
    evaluations: list[dg.AssetCheckEvaluation] = []
    with dg.DagsterInstance.ephemeral() as instance:
        for step in PIPELINE[:3]:
            job = defs.resolve_job_def(step.name)
            for shard in settings.experiment.shard_keys if job.partitions_def else [None]:
                result = job.execute_in_process(instance=instance, partition_key=shard, raise_on_error=False)
                evaluations += result.get_asset_check_evaluations()
                if not result.success:
                    return evaluations, result
    return evaluations, result


def files_settings(tmp_path: Path, shards: int, **corpus: float) -> Settings:
    source = FilesSource(path=str(tmp_path / "corpus"))
    changes = {f"experiment.corpus.{name}": value for name, value in corpus.items()}
    return tiny_settings(tmp_path, {"experiment.corpus.source": source, "experiment.corpus.shards": shards, **changes})


def write_files(tmp_path: Path, repeated: bool) -> None:
    """Write two files of 100 different texts each, whose ids are different but for one, or all repeat."""
    (tmp_path / "corpus").mkdir()
    for part in range(2):
        rows = [
            f'{{"id": {n if repeated or n == 0 else 1000 * part + n}, "text": "text {n} of file {part}: '
            f'{" ".join(str((7919 * part + 104729 * n + 31 * n * word) % 10_007) for word in range(12))}"}}'
            for n in range(100)
        ]
        (tmp_path / f"corpus/{part}.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize(("shards", "step"), [(1, "ingest_shards"), (2, "corpus__duplicates")])
def test_ids_that_start_again_in_every_file_stop_the_run(tmp_path: Path, shards: int, step: str) -> None:
    write_files(tmp_path, repeated=True)
    _, result = ingested(files_settings(tmp_path, shards))
    failure = next(event for event in result.all_events if event.is_step_failure)
    assert failure.step_key == step
    told = str(failure.step_failure_data.error)
    assert "100 of 200 documents (50%) have the id of a document of another text" in told
    assert "for example '0' in" in told and "corpus.source.id_field to null" in told
    assert ingested(files_settings(tmp_path, shards, max_repeated_ids=1.0))[1].success


@pytest.mark.parametrize(
    ("shards", "check"),
    [(1, "corpus/rejected_rows:ids_stand_for_one_text_in_the_shard"), (2, "corpus/duplicates:ids_stand_for_one_text")],
)
def test_a_document_that_is_lost_to_a_repeated_id_is_told(tmp_path: Path, shards: int, check: str) -> None:
    write_files(tmp_path, repeated=False)
    evaluations, result = ingested(files_settings(tmp_path, shards))
    assert result.success
    failed = [evaluation for evaluation in evaluations if not evaluation.passed]
    assert [evaluation.asset_check_key.to_user_string() for evaluation in failed] == [check]
    assert failed[0].severity == dg.AssetCheckSeverity.WARN and "'0'" in str(failed[0].description)


def test_files_that_are_not_read_are_named_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, repeated=False)
    told = []
    for names, named in [(["a.md", "b.md", "_c.jsonl"], 3), ([], 2), (["d.md", "e.md", "f.md"], 1000)]:
        for name in names:
            (tmp_path / "corpus" / name).touch()
        monkeypatch.setattr(assets, "NAMED", named)
        evaluations, _ = ingested(files_settings(tmp_path, 1))
        text = next(str(e.description) for e in evaluations if e.asset_check_key.name == "every_file_is_read")
        told.append([unescape(line.removeprefix("- ")) for line in text.splitlines()])
    hidden = "_c.jsonl: hidden: its name begins with . or _"
    a, b = "a.md: unknown ending", "b.md: unknown ending"
    assert told[0] == [hidden, a, b]
    place = "by name in files_left_out of corpus/source_manifest"
    assert told[1] == [f"3 are not read (1 × hidden, 2 × unknown ending), the first 2 {place}", hidden, a]
    assert told[2][:2] == [f"6 are not read (1 × hidden, 5 × unknown ending), 6 {place}", hidden]
    assert told[2][-1] == "and 2 more"


def test_many_rejected_rows_are_told_with_the_reason(tmp_path: Path) -> None:
    write_files(tmp_path, repeated=False)
    (tmp_path / "corpus/2.jsonl").write_text('{"body": "another field"}\n' * 20)
    evaluations, _ = ingested(files_settings(tmp_path, 1))
    told = {e.asset_check_key.name: e.description for e in evaluations if not e.passed}
    assert "21 of 220 rows are rejected" in str(told["rejected_share_is_low"])
    assert "of which 20: no text" in str(told["rejected_share_is_low"])
