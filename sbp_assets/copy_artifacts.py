"""Artifacts copied to another store: from a laptop's disk to a bucket, from one bucket to another, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import dagster as dg

from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.io_managers import ArtifactIOManager


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

    What `ledger` (JSON lines) lists was copied by an earlier call and is left out; what is lost or damaged at its
    source is not copied, but named. `track` hands on the artifacts one by one, and may show how far it is.
    """
    ledger.parent.mkdir(parents=True, exist_ok=True)
    text = ledger.read_text() if ledger.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a machine that went down may have cut the last line off
    lines = map(json.loads, whole.splitlines())
    done = {Artifact(dg.AssetKey(key), partition, version) for key, partition, version in lines}
    now, damaged = 0, []
    with ledger.open("a") as file:
        file.truncate(len(whole.encode()))
        for artifact in track([artifact for artifact in artifacts if artifact not in done]):
            key, partition, version = artifact
            try:
                local = source[key].fetch(key, partition)
                sound = content_version(local) == version
            except FileNotFoundError:
                sound = False
            if not sound:
                damaged.append(artifact.name)
                continue
            target[key].put(key, partition, local)
            source[key].release()
            file.write(json.dumps([key.path, partition, version]) + "\n")
            file.flush()
            now += 1
    return Copied(now, sum(artifact in done for artifact in artifacts), damaged)
