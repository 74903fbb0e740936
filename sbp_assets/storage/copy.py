"""Copying artifacts to another store: from a laptop's disk to a bucket, from one bucket to another, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import dagster as dg

from sbp_assets.storage.artifacts import bytes_on_disk, content_version, named_when_full
from sbp_assets.storage.io_managers import ArtifactIOManager
from sbp_assets.storage.remote import CorruptedArtifactError

RELEASE_BYTES = 2**30  # of fetched copies between two releases, each of which walks through the whole cache


class Artifact(NamedTuple):
    """A partition of an asset, or an unpartitioned one, with the content version that its asset gave it."""

    key: dg.AssetKey
    partition: str | None
    version: str

    @property
    def name(self) -> str:
        """Return the artifact's name, as in `sbp trace`: stage/name/partition."""
        return "/".join([*self.key.path, *filter(None, [self.partition])])


class Copied(NamedTuple):
    """Counts of artifacts copied now and before, and the names of those that are lost or corrupted at the source."""

    now: int
    before: int
    corrupted: list[str]


def copy_artifacts(
    artifacts: Sequence[Artifact],
    source: Mapping[dg.AssetKey, ArtifactIOManager],
    target: Mapping[dg.AssetKey, ArtifactIOManager],
    ledger: Path,
    track: Callable[[Sequence[Artifact]], Iterable[Artifact]] = lambda artifacts: artifacts,
) -> Copied:
    """Copy `artifacts` from store to store (managers by asset), each whole or not at all; return what was done.

    An artifact that an earlier call copied, by `ledger` (JSON lines), and that the target still has is left out. One
    that is lost or corrupted at its source is not copied, but named. `track` yields the artifacts one by one, and may
    show a progress bar. Raises StorageError when a store cannot be used, and OSError when a disk is full.
    """
    ledger.parent.mkdir(parents=True, exist_ok=True)
    text = ledger.read_text(encoding="utf-8") if ledger.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a machine that went down may have cut the last line off
    lines = map(json.loads, whole.splitlines())
    etags = {Artifact(dg.AssetKey(key), partition, version): etag for key, partition, version, etag in lines}
    now, before, corrupted, unreleased = 0, 0, [], 0
    with named_when_full(ledger), ledger.open("a", encoding="utf-8") as file:
        file.truncate(len(whole.encode()))
        for artifact in track(artifacts):
            key, partition, version = artifact
            if artifact in etags and etags[artifact] == target[key].etag(key, partition):
                before += 1
                continue
            try:
                local = source[key].fetch(key, partition)
                intact = content_version(local) == version
            except (FileNotFoundError, CorruptedArtifactError):
                intact = False
            if not intact:
                corrupted.append(artifact.name)
                continue
            target[key].put(key, partition, local, version)
            file.write(json.dumps([key.path, partition, version, target[key].etag(key, partition)]) + "\n")
            file.flush()
            now += 1
            unreleased += bytes_on_disk(local)
            if unreleased > RELEASE_BYTES:
                for manager in source.values():
                    manager.release()
                unreleased = 0
    return Copied(now, before, corrupted)
