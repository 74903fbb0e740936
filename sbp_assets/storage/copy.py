"""Artifacts copied to another store: from a laptop's disk to a bucket, from one bucket to another, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import dagster as dg

from sbp_assets.storage.artifacts import bytes_on_disk, content_version, named_when_full
from sbp_assets.storage.io_managers import ArtifactIOManager
from sbp_assets.storage.remote import DamagedError

RELEASE_BYTES = 2**30  # of copies that were fetched; with each release all of the cache is looked through


class Artifact(NamedTuple):
    """A partition of an asset, or an unpartitioned one, with the content version that its asset gave it."""

    key: dg.AssetKey
    partition: str | None
    version: str

    @property
    def name(self) -> str:
        """As in `sbp trace`: stage/name/partition."""
        return "/".join([*self.key.path, *filter(None, [self.partition])])


class Copied(NamedTuple):
    """How many artifacts were copied, and had been before; and those whose content is not what was made."""

    now: int
    before: int
    damaged: list[str]


def copy_artifacts(
    artifacts: Sequence[Artifact],
    source: Mapping[dg.AssetKey, ArtifactIOManager],
    target: Mapping[dg.AssetKey, ArtifactIOManager],
    ledger: Path,
    track: Callable[[Sequence[Artifact]], Iterable[Artifact]] = lambda artifacts: artifacts,
) -> Copied:
    """Copy `artifacts` from store to store, given by asset; every one arrives whole or not at all.

    What an earlier call has copied by `ledger` (JSON lines), and the target still has, is left out; what is lost or
    damaged at its source is not copied, but named. `track` hands on the artifacts one by one, and may show how far it
    is.
    """
    ledger.parent.mkdir(parents=True, exist_ok=True)
    text = ledger.read_text() if ledger.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a machine that went down may have cut the last line off
    lines = map(json.loads, whole.splitlines())
    marks = {Artifact(dg.AssetKey(key), partition, version): mark for key, partition, version, mark in lines}
    now, before, damaged, unreleased = 0, 0, [], 0
    with named_when_full(ledger), ledger.open("a") as file:
        file.truncate(len(whole.encode()))
        for artifact in track(artifacts):
            key, partition, version = artifact
            if artifact in marks and marks[artifact] == target[key].mark(key, partition):
                before += 1
                continue
            try:
                local = source[key].fetch(key, partition)
                sound = content_version(local) == version
            except (FileNotFoundError, DamagedError):
                sound = False
            if not sound:
                damaged.append(artifact.name)
                continue
            target[key].put(key, partition, local, version)
            file.write(json.dumps([key.path, partition, version, target[key].mark(key, partition)]) + "\n")
            file.flush()
            now += 1
            unreleased += bytes_on_disk(local)
            if unreleased > RELEASE_BYTES:
                for manager in source.values():
                    manager.release()
                unreleased = 0
    return Copied(now, before, damaged)
