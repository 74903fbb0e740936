"""The recipes of docs/operating.md, run as written: the shell blocks below a heading, then what they promise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.settings import ConceptsSource
from sbp_assets_tests.operations.deployment import CHECKOUT, Deployment

RUNBOOK = CHECKOUT / "docs/operating.md"


def recipe(heading: str, number: int = 0) -> str:
    """The shell block `number` below `## heading` of the runbook."""
    sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)
    section = next(text for text in sections if text.splitlines()[0] == f"{heading} ▸")
    return re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[number]


def follow(deployment: Deployment, script: str, **variables: str) -> str:
    """What the script printed; it runs where `sbp` and `dagster` are on the path, and stops at the first error."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={
            **deployment.environ,
            "PATH": f"{Path(sys.executable).parent}:{deployment.environ['PATH']}",
            **variables,
        },
        cwd=deployment.home,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def jobs_run(output: str) -> dict[str, str]:
    """Steps that were not fresh, by title, with their count of partitions, from what `sbp run` printed."""
    return dict(re.findall(r"^\[   done\] (.+?) (\d+/\d+)", output, flags=re.MULTILINE))


def write_documents(path: Path, first: int, count: int) -> None:
    world = ConceptWorld(ConceptsSource(documents=1000, concepts=12, attributes=4, facts_per_document=2))
    rows = (world.document(number) for number in range(first, first + count))
    path.write_text("".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path: Path) -> Deployment:
    """A deployment over two files of a folder, one per shard, run up to the pairs."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_documents(corpus / "2026-10.jsonl", 0, 300)
    write_documents(corpus / "2026-11.jsonl", 300, 300)
    source = {"kind": "files", "path": str(corpus), "files_per_shard": 1}
    deployment = Deployment(tmp_path / "home", {"SBP_EXPERIMENT__CORPUS__SOURCE": json.dumps(source)})
    deployment.sbp("run", "--until", "pair")
    return deployment


def test_new_files_in_a_new_shard_leave_the_old_shards_documents_alone(files: Deployment, tmp_path: Path) -> None:
    before = files.versions()
    write_documents(tmp_path / "new.jsonl", 600, 200)
    output = follow(
        files, recipe("New files, new shards"), NEW_FILES=str(tmp_path / "new.jsonl"), CORPUS=str(tmp_path / "corpus")
    )
    after = files.versions()
    assert "corpus/documents/00002.parquet" in after
    unchanged = [name for name in before if name.startswith(("corpus/raw_documents", "corpus/minhash_signatures"))]
    assert len(unchanged) == 4
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert jobs_run(output)["Split documents"]


def test_a_changed_setting_materialises_only_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", finished=finished)
    before = deployment.versions()
    output = follow(deployment, recipe("A changed setting"))
    changed = {name for name, version in deployment.versions().items() if before[name] != version}
    pairs = {f"pairing/neighbor_pairs/{shard:05d}.parquet" for shard in range(2)}
    assert changed <= {"pairing/neighbor_edges/00000", *pairs}
    assert list(jobs_run(output)) == ["Filter to edges", "Choose pairs"]


def test_a_backup_restored_elsewhere_is_up_to_date(finished: Path, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", finished=finished)
    follow(deployment, recipe("What to back up"), BACKUP=str(tmp_path / "backup"))
    shutil.rmtree(deployment.home)
    restored = Deployment(tmp_path / "elsewhere")
    follow(restored, recipe("What to back up", 1), BACKUP=str(tmp_path / "backup"))
    assert restored.versions() == Deployment(finished).versions()
    assert "nothing to do" in restored.sbp("run").stdout


def test_an_upgrade_leaves_everything_fresh(finished: Path, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", finished=finished)
    follow(deployment, recipe("Upgrading"))
    assert "nothing to do" in deployment.sbp("run").stdout
