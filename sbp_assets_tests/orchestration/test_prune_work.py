"""What is removed from work_dir, and what may still be resumed from."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbp_assets.orchestration.prune_work import CACHE, CHECKPOINTS, LEDGERS, Resumable, find_in_work
from sbp_assets.storage.artifacts import ABANDONED
from sbp_assets.storage.cache import Cache
from sbp_assets.storage.prune import UNFINISHED, Found

DAYS = 30 * 24 * 3600
NOW, OLD, OTHER = "0123456789abcdef", "fedcba9876543210", "0000000000000000"
RESUMABLE = Resumable(
    shards={"00000"},
    fingerprints={NOW, OTHER},
    trained={"sbp_model", "synthesizer"},
    training={"sbp_model/1"},
)


def write(path: Path, age: float = DAYS + 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    for changed in (path, path.parent):
        os.utime(changed, (time.time() - age, time.time() - age))
    return path


def look(work: Path, resumable: Resumable = RESUMABLE, *elsewhere: Path) -> Found:
    return find_in_work(work, 1e9, resumable, DAYS, elsewhere)


def found(work: Path, resumable: Resumable = RESUMABLE) -> set[tuple[str, str]]:
    return {(one.kind, one.path) for one in look(work, resumable).leftovers}


def test_ledgers_of_other_samples_and_of_undefined_shards_go(tmp_path: Path):
    for place in (f"00000/{NOW}", f"00000/{OTHER}", f"00000/{OLD}", f"00001/{NOW}", "00000/notes"):
        write(tmp_path / f"synthesis/{place}/000000-engine0.jsonl")
    write(tmp_path / "synthesis/00000/1111111111111111/000000-engine0.jsonl", age=60)
    write(tmp_path / "synthesis/00001/2222222222222222/picture.png")
    assert found(tmp_path) == {(LEDGERS, f"synthesis/00000/{OLD}"), (LEDGERS, f"synthesis/00001/{NOW}")}
    # While it is not known what is going to sample, any ledger of a shard may be continued.
    unknown = Resumable(RESUMABLE.shards, None, RESUMABLE.trained, RESUMABLE.training)
    assert found(tmp_path, unknown) == {(LEDGERS, f"synthesis/00001/{NOW}")}
    for one in look(tmp_path).leftovers:
        one.remove()
    assert found(tmp_path) == set() and (tmp_path / f"synthesis/00000/{NOW}").is_dir()


def test_checkpoints_stay_while_their_model_is_pending(tmp_path: Path):
    for run in ("sbp_model/0", "sbp_model/1", "synthesizer/checkpoint"):
        for name in ("checkpoint.pt", "best-12.pt", "spec.json", "lock"):
            write(tmp_path / run / name)
        write(tmp_path / "staging" / run / "model.safetensors")
    write(tmp_path / "sbp_model/2/checkpoint.pt", age=60)
    expected = {
        (CHECKPOINTS, f"{run}/{name}")
        for run in ("sbp_model/0", "synthesizer/checkpoint")
        for name in ("checkpoint.pt", "best-12.pt")
    }
    expected |= {(CHECKPOINTS, "staging/sbp_model/0"), (CHECKPOINTS, "staging/synthesizer/checkpoint")}
    assert found(tmp_path) == expected
    for one in look(tmp_path).leftovers:
        one.remove()
    assert sorted(path.name for path in (tmp_path / "sbp_model/0").iterdir()) == ["lock", "spec.json"]
    assert (tmp_path / "sbp_model/1/checkpoint.pt").exists() and found(tmp_path) == set()


HOLDER = """
import sys
from sbp_assets.storage.artifacts import staging
for asset, partition in (("tokens", "00000"), ("tokenizer", "")):
    print(staging(sys.argv[1], asset, partition), flush=True)
sys.stdin.read()
"""


def test_what_an_artifact_was_built_in_goes_when_its_process_is_gone(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin and holder.stdout
    attempts = [Path(holder.stdout.readline().strip()).parent for _ in range(2)]
    for attempt in attempts:
        for path in (*attempt.iterdir(), attempt):
            os.utime(path, (time.time() - ABANDONED - 60,) * 2)
    assert found(tmp_path) == set(), "a living process works in them"
    holder.stdin.close()
    assert holder.wait() == 0
    assert found(tmp_path) == {(UNFINISHED, attempt.relative_to(tmp_path).as_posix()) for attempt in attempts}
    os.utime(attempts[0] / "staged")
    assert len(found(tmp_path)) == 1, "of today"


def test_a_removal_that_was_killed_is_finished_a_day_later(tmp_path: Path):
    hidden = f".{NOW}.{NOW}{NOW}.partial"
    places = {f"synthesis/00000/{hidden}": 2, f"staging/tokens/00000/{hidden}": 2, f"staging/a/{hidden}": 0}
    for place, age in places.items():
        write(tmp_path / place / "file", age=age * ABANDONED)
    assert found(tmp_path) == {
        (UNFINISHED, f"synthesis/00000/{hidden}"),
        (UNFINISHED, f"staging/tokens/00000/{hidden}"),
    }


def test_copies_that_nobody_reads_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = Cache(tmp_path / "cache", 1e9)
    for name in ("read", "unread"):
        cache.get(name, "file", lambda path: path.write_text("text"))
        os.utime(tmp_path / f"cache/copies/{name}", (time.time() - DAYS - 60,) * 2)
    assert found(tmp_path) == set(), "this process has asked for them"
    cache.release()
    assert {kind for kind, _ in found(tmp_path)} == {CACHE}
    leftovers = look(tmp_path).leftovers
    cache.get("read", "file", lambda _: pytest.fail("it is there"))
    for one in leftovers:
        one.remove()
    assert [path.name for path in (tmp_path / "cache/copies").iterdir()] == ["read"]


def test_what_is_not_the_projects_own_is_named_and_left(tmp_path: Path):
    for name in ("judge.jsonl", "copied/0123.jsonl", "old_model/0/checkpoint.pt", "notes.txt", "instance/lock"):
        write(tmp_path / name)
    seen = look(tmp_path, RESUMABLE, tmp_path / "instance")
    assert seen.leftovers == [] and seen.unknown == [str(tmp_path / "notes.txt"), f"{tmp_path}/old_model/"]
    assert look(tmp_path / "nothing") == Found() and not (tmp_path / "cache").exists()
