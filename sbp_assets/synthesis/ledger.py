"""Where the finished requests of a shard wait, whose they are, and which engine finishes a shard.

Finished requests lie in `<work>/<shard>/<fingerprint>/*.jsonl`, the fingerprint being that of the synthesizer, the
sampling settings and the engine, so that the requests of another synthesizer are never used and no shard is of two
engines. They stay after the artifact is stored (storing may fail) and are removed when the shard is generated with
another fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sbp_assets.settings import Synthesis
from sbp_assets.synthesis.engine import ENGINES, Engine, default_engine

logger = logging.getLogger("sbp_assets.synthesis.ledger")

Key = tuple[str, int]  # (seed document, rollout)
Count = Callable[[list[str]], list[int]]  # tokens of each text, <bos> and <eos> included


@dataclass(frozen=True)
class Generation:
    """A finished request. `n_tokens` counts the text as synthetic_tokens holds it, 0 where the text is empty."""

    seed_id: str
    rollout: int
    sampling_seed: int
    text: str
    finish_reason: str
    n_tokens: int


RECORDED = [field.name for field in fields(Generation) if field.name != "n_tokens"]


def fingerprint(
    synthesizer_version: str, settings: Synthesis, max_document_tokens: int, context_length: int, engine: Engine
) -> str:
    """Return the digest of everything that decides what a request samples (16 hex digits)."""
    sampled = settings.model_dump(mode="json", include={"temperature", "top_p", "dtype", "salt", "condition"})
    values = [synthesizer_version, sampled, max_document_tokens, context_length]
    if engine != "vllm":
        # vLLM was the only engine once: ledgers of that time are its own, and their samples remain good.
        values.append(engine)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def engine_of_shard(directory: Path, setting: Literal["auto"] | Engine, fingerprints: Mapping[Engine, str]) -> Engine:
    """Return the engine that samples the shard whose ledgers lie in `directory`: the setting's.

    With auto it is the one that began the shard (with these fingerprints), as a shard is finished by the engine that
    began it; where nothing is finished, it is the one that is installed here.
    """
    if setting != "auto":
        return setting
    preferred = default_engine()
    for engine in sorted(ENGINES, key=lambda engine: engine != preferred):
        for path in (directory / fingerprints[engine]).glob("*.jsonl"):
            with path.open("rb") as stream:
                # A line without an end was torn when its writer died: nothing is finished in that file.
                if stream.readline().endswith(b"\n"):
                    return engine
    return preferred


class Ledger:
    """Finished requests of one shard and fingerprint: one JSON line each, a file per engine and session.

    A line that does not parse was torn by a kill and counts as unfinished. A request recorded twice keeps its first
    record, in order of file name.
    """

    def __init__(self, directory: Path, count_tokens: Count) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.finished: dict[Key, Generation] = {}
        self._count = count_tokens
        self._read: dict[Path, int] = {}
        # Never continue a file: its last line may be torn.
        self._session = f"{len(list(directory.glob('*.jsonl'))):06d}-{uuid.uuid4().hex[:8]}"
        self.refresh()

    def remove_others(self) -> None:
        """Remove the shard's ledgers of other fingerprints, whose samples this one replaces."""
        for other in self.directory.parent.iterdir():
            if other != self.directory and other.is_dir():
                logger.info("removing a generation ledger of another synthesizer, engine or settings: %s", other)
                shutil.rmtree(other)

    def session_files(self, engines: int) -> list[Path]:
        """Return a file per engine for what this process generates."""
        return [self.directory / f"{self._session}-engine{engine}.jsonl" for engine in range(engines)]

    def refresh(self) -> list[Generation]:
        """Read what was written since, and return the newly finished requests."""
        rows: list[dict] = []
        for path in sorted(self.directory.glob("*.jsonl")):
            with path.open("rb") as stream:
                stream.seek(self._read.get(path, 0))
                data = stream.read()
            # The line without an end is being written, or was when its writer died.
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                try:
                    row = json.loads(line)
                    rows.append({name: row[name] for name in RECORDED})
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s: a corrupted line is dropped and its request sampled again", path)
        counts = iter(self._count([row["text"] for row in rows]))
        new = []
        for row in rows:
            # Blank text teaches nothing, and the tokens of nothing but <bos> and <eos> would still fill the budget.
            n_tokens = next(counts)
            generation = Generation(**row, n_tokens=n_tokens if row["text"].strip() else 0)
            if (key := (generation.seed_id, generation.rollout)) not in self.finished:
                self.finished[key] = generation
                new.append(generation)
        return new
