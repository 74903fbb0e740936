"""What a deployment's work_dir holds that no current artifact can resume from. Plain code: no dagster."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sbp_assets.storage.artifacts import in_use, is_abandoned, last_written
from sbp_assets.storage.cache import Cache
from sbp_assets.storage.prune import UNFINISHED, Found, Leftover, bytes_to_free, is_unfinished, remove
from sbp_assets.training.checkpoint import files_to_resume_from

LEDGERS = "generation ledgers"
CHECKPOINTS = "training checkpoints"
CACHE = "copies in the cache"

# Below work_dir, what is small or shared and stays: verdicts of the judge, what `sbp copy-artifacts` has copied,
# similarities of candidates for duplicates.
_KEPT = {"judge.jsonl", "copied", "cache", "similarities"}
_ATTEMPT = re.compile("[0-9a-f]{32}")
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Resumable:
    """What may still be resumed from.

    Generation: the ledgers of `shards` with one of `fingerprints`, or with any where that is None. Training: the runs
    in the folders `training` below work_dir, as in sbp_model/0, out of those in `trained`, their folders above.
    """

    shards: Collection[str]
    fingerprints: Collection[str] | None
    trained: Collection[str]
    training: Collection[str]


def find_in_work(
    work: Path, cache_bytes: float, resumable: Resumable, seconds: float, elsewhere: Collection[Path] = ()
) -> Found:
    """Return what in the folder `work` nothing is going to read, and has not been changed for `seconds`.

    Directories that artifacts were built in are leftovers when their process is gone, after a day. Local folders of
    `elsewhere`, which belong to something else, are left out. Removes nothing.
    """
    found = Found()
    if not work.is_dir():
        return found
    others = {path.resolve() for path in elsewhere}
    old = lambda path: time.time() - last_written(path) >= seconds  # noqa: E731
    for folder in sorted(work.iterdir()):
        if folder.name in _KEPT or folder.resolve() in others:
            continue
        if folder.name == "synthesis":
            found.leftovers += [_leftover(LEDGERS, work, path) for path in _ledgers(folder, resumable) if old(path)]
        elif folder.name == "staging":
            found.leftovers += [_leftover(UNFINISHED, work, path) for path in _attempts(folder)]
            found.leftovers += [_leftover(CHECKPOINTS, work, path) for path in _ended(folder, resumable) if old(path)]
        elif folder.name in resumable.trained:
            files = [file for run in _ended(work, resumable, folder.name) for file in files_to_resume_from(run)]
            found.leftovers += [_leftover(CHECKPOINTS, work, file) for file in files if old(file)]
        else:
            found.unknown.append(f"{folder}/" if folder.is_dir() else str(folder))
            continue
        unfinished = (path for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/.*.partial")))
        found.leftovers += [_leftover(UNFINISHED, work, path) for path in unfinished if is_unfinished(path)]
    cache = Cache(work / "cache", cache_bytes)
    for copy in cache.unused(seconds):
        place = copy.relative_to(work).as_posix()
        found.leftovers.append(Leftover(CACHE, place, bytes_to_free(copy), partial(cache.remove, copy)))
    return found


def _leftover(kind: str, work: Path, path: Path) -> Leftover:
    return Leftover(kind, path.relative_to(work).as_posix(), bytes_to_free(path), partial(remove, path))


def _ledgers(folder: Path, resumable: Resumable) -> Iterator[Path]:
    for ledger in sorted(folder.glob("*/*")):
        if not _FINGERPRINT.fullmatch(ledger.name) or any(file.suffix != ".jsonl" for file in ledger.iterdir()):
            continue
        known = resumable.fingerprints is None or ledger.name in resumable.fingerprints
        if not known or ledger.parent.name not in resumable.shards:
            yield ledger


def _attempts(staging: Path) -> Iterator[Path]:
    """Yield the directories that artifacts were built in by processes that are gone."""
    for depth in ("*/*", "*/*/*"):
        for path in sorted(staging.glob(depth)):
            made = _ATTEMPT.fullmatch(path.name) and (path / "lock").is_file()
            if made and is_abandoned(path) and not in_use(path):
                yield path


def _ended(folder: Path, resumable: Resumable, name: str = "*") -> Iterator[Path]:
    """Yield the folders of training runs below `folder` that nothing resumes: `<trained>/<run>`."""
    for path in sorted(folder.glob(f"{name}/*")):
        place = f"{path.parent.name}/{path.name}"
        if path.parent.name in resumable.trained and path.is_dir() and place not in resumable.training:
            yield path
