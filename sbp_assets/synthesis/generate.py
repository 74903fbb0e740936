"""Which synthetic documents a shard holds, in which order they are sampled, and how a stopped run resumes.

Requests are ordered in turn (every seed document's rollout 0 in order of id, then every rollout 1, …) or as if each
seed document were drawn uniformly at random, with replacement (`synthesis.seed_order`). A shard's rows are the shortest
prefix of that order whose tokens reach the shard's budget. Rows are thus a pure function of the outputs: neither the
order in which engines finish nor a restart can change which are kept. What a request samples does not depend on the
order.

Finished requests wait in the shard's ledger (`synthesis.ledger`).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count

import polars as pl

from sbp_assets.settings import Synthesis
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.engine import (
    ANOTHER_ENGINE,
    EngineError,
    EngineSpec,
    Generator,
    Request,
    Sampling,
    how_to_install,
    installed,
)
from sbp_assets.synthesis.ledger import Key, Ledger

logger = logging.getLogger("sbp_assets.synthesis.generate")

_SEEDS = "corpus/tokens.id corpus/documents.id"
# What the sources of the others are depends on the settings: with a condition, d1 is one of them.
DOCUMENT_COLUMNS = [
    Column("id", pl.String, "`syn-{seed_id}-{rollout}`", _SEEDS),
    Column("seed_id", pl.String, "The document d1 of D that it was sampled from.", _SEEDS),
    Column("rollout", pl.Int64, "0-based number of the document among its seed's."),
    Column("sampling_seed", pl.Int64, "Of this request's random numbers.", _SEEDS),
    Column("text", pl.String, "What was sampled, or d1 and d2 of a real pair."),
    Column("n_tokens", pl.Int64, "As synthetic_tokens holds it, `<bos>` and `<eos>` included."),
    Column("finish_reason", pl.String, "stop (`<eos>`), or length (the context was full)."),
    Column("synthesizer_version", pl.String, "Content of the sampled checkpoint, or of the tuning examples."),
    Column("engine", pl.String, "vllm or transformers: what sampled it, the same in a whole shard; none: real pairs."),
]
DOCUMENT_SCHEMA = table_schema(DOCUMENT_COLUMNS)
TOKEN_COLUMNS = [
    Column("id", pl.String, "Synthetic document; of documents.parquet.", "synthesis/synthetic_documents"),
    Column(
        "seed_id",
        pl.String,
        "The document d1 it was sampled from; of documents.parquet.",
        "synthesis/synthetic_documents",
    ),
    Column("tokens", "array[uint]", "Of tokens.npy: `<bos>` ids `<eos>`.", "synthesis/synthetic_documents.text"),
]
FINISH_REASONS = ("stop", "length")

# A wave is what the engines work on between two looks at the budget. A longer one wastes a smaller share on its tail, a
# bounded one bounds the memory of the queue.
SEQUENCES_PER_WAVE = 16
# Few enough to throw away, enough to keep an engine busy.
MIN_WAVE_PER_ENGINE = 4
# Of the budget, while the length of a synthetic document is a guess.
FIRST_WAVE = 0.25
# So many synthetic documents in a row without a single word mean a synthesizer that cannot write.
EMPTY_LIMIT = 200


class SynthesisError(ValueError):
    """No shard can be generated from the seeds, settings or synthesizer; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """A shard's rows, and what it took to sample them."""

    rows: pl.DataFrame
    budget: int  # tokens asked for
    requests: int  # in the prefix, empty ones included
    empty: int  # of those, without text: not rows
    discarded: int  # finished, but behind the prefix
    resumed: int  # found finished in the ledger
    startup_seconds: float | None  # of the engines; null where none was needed
    engine_reused: bool | None
    tokens_per_second: float  # of sampling alone, all engines together; 0 where none was needed


def sampling_seed(salt: str, seed_id: str, rollout: int) -> int:
    """Return the seed of a request's random numbers, in [0, 2**63): a stable hash, the same on every machine."""
    digest = hashlib.sha256(json.dumps([salt, seed_id, rollout]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def order_salt(settings: Synthesis) -> str | None:
    """Return the salt of the request order: None where seed documents take turns."""
    return settings.salt if settings.seed_order == "random" else None


def request_order(seed_ids: Iterable[str], salt: str | None = None) -> Iterator[Key]:
    """Yield without end: rollout 0 of every seed document in order of id, then rollout 1, …

    With a `salt`, seed documents are drawn uniformly at random, with replacement: each has arrivals of its own, with
    independent exponential waiting times that are hashes of salt, id and rollout, and the arrivals of all are put into
    order of time. Whose is the next one is then uniform and independent of all before (Poisson processes superpose),
    and the order of two requests does not depend on which other seed documents there are.
    """
    ids = sorted(seed_ids)
    if not ids:
        return
    if salt is None:
        yield from ((seed_id, rollout) for rollout in count() for seed_id in ids)
        return
    waiting = [(_waiting_time(salt, seed_id, 0), seed_id, 0) for seed_id in ids]
    heapq.heapify(waiting)
    while True:
        time_, seed_id, rollout = waiting[0]
        yield seed_id, rollout
        following = rollout + 1
        heapq.heapreplace(waiting, (time_ + _waiting_time(salt, seed_id, following), seed_id, following))


def _waiting_time(salt: str, seed_id: str, rollout: int) -> float:
    """Return a draw of the exponential distribution with mean 1: a stable hash."""
    digest = hashlib.sha256(json.dumps([salt, "order", seed_id, rollout]).encode()).digest()
    return -math.log1p(-(int.from_bytes(digest[:8], "big") >> 11) / 2**53)


def budget_prefix(
    seed_ids: Iterable[str], tokens: Mapping[Key, int], budget: int, salt: str | None = None
) -> tuple[list[Key], bool]:
    """Return the shortest prefix of the request order (of `salt`) whose tokens reach `budget`, and whether it does.

    `tokens` holds the finished requests. Where the first missing one comes before the budget is reached, the prefix up
    to it is returned with False.
    """
    prefix: list[Key] = []
    reached = 0
    if budget <= 0:
        return prefix, True
    for key in request_order(seed_ids, salt):
        if key not in tokens:
            return prefix, False
        prefix.append(key)
        reached += tokens[key]
        if reached >= budget:
            return prefix, True
    return prefix, False


def generate_shard(
    prompts: Mapping[str, list[int]],
    budget: int,
    expected_tokens: float,
    generator: Generator,
    spec: EngineSpec,
    settings: Synthesis,
    eos_id: int,
    ledger: Ledger,
    progress: Progress,
) -> Outcome:
    """Sample the shard's synthetic documents until `budget` tokens are reached, and return them.

    `prompts` maps each seed document's id to the token ids of its prompt. `expected_tokens` is a guess of a document's
    tokens for the first wave. `progress` counts tokens. Engines start only where something is left to sample.

    Raises SynthesisError for a budget without seeds, a prompt that leaves no room in the context, or a synthesizer that
    writes nothing; EngineError where an engine cannot start or dies.
    """
    if budget > 0 and not prompts:
        raise SynthesisError(f"a budget of {budget} tokens and no seed document")
    for seed_id, prompt in prompts.items():
        if len(prompt) >= spec.context_length:
            raise SynthesisError(
                f"document {seed_id}: its prompt of {len(prompt)} tokens fills the context of {spec.context_length}; "
                "lower synthesizer.max_document_tokens"
            )
    resumed = len(ledger.finished)
    if resumed:
        logger.info("%d synthetic documents are in the ledger %s and are not sampled again", resumed, ledger.directory)
    startup_seconds: float | None = None
    reused: bool | None = None
    seconds, sampled = 0.0, progress.done
    sampling, salt = Sampling(settings.temperature, settings.top_p, eos_id), order_salt(settings)

    def poll() -> None:
        progress.advance(sum(generation.n_tokens for generation in ledger.refresh()))

    while True:
        tokens = {key: generation.n_tokens for key, generation in ledger.finished.items()}
        prefix, met = budget_prefix(prompts, tokens, budget, salt)
        if met:
            break
        reached = sum(tokens[key] for key in prefix)
        if not reached and len(prefix) >= EMPTY_LIMIT:
            raise SynthesisError(
                f"the first {len(prefix)} synthetic documents are all empty: the synthesizer ends every one at once. "
                "Look at synthesizer/checkpoint (was it tuned, and on enough pairs?)"
            )
        if ledger.finished and not installed(spec.engine):
            raise EngineError(
                f"shard {ledger.directory.parent.name} was begun by {spec.engine} ({len(ledger.finished)} finished), "
                "which is not installed here, and a shard is finished by the engine that began it. Install it "
                f"({how_to_install(spec.engine)}), or set {ANOTHER_ENGINE}, which samples this shard from the beginning"
            )
        engines, was_running = generator.engines(spec)
        # Only now: what a named engine cannot replace, because it does not start, stays.
        ledger.remove_others()
        if startup_seconds is None:
            startup_seconds, reused = (0.0 if was_running else engines.startup_seconds), was_running
        keys = next_wave(prompts, tokens, budget, expected_tokens, spec.processes, spec.max_sequences, salt)
        wave = [Request(key[0], key[1], sampling_seed(settings.salt, *key), prompts[key[0]]) for key in keys]
        began = time.monotonic()
        engines.generate(wave, sampling, ledger.session_files(spec.processes), poll)
        seconds += time.monotonic() - began

    ledger.remove_others()
    kept = [ledger.finished[key] for key in prefix]
    rows = pl.DataFrame(
        [
            {
                "id": f"syn-{generation.seed_id}-{generation.rollout}",
                **asdict(generation),
                "synthesizer_version": spec.version,
                "engine": spec.engine,
            }
            for generation in kept
            if generation.n_tokens
        ],
        schema=DOCUMENT_SCHEMA,
    )
    return Outcome(
        rows=rows,
        budget=budget,
        requests=len(prefix),
        empty=len(prefix) - len(rows),
        discarded=len(ledger.finished) - len(prefix),
        resumed=resumed,
        startup_seconds=startup_seconds,
        engine_reused=reused,
        tokens_per_second=(progress.done - sampled) / seconds if seconds else 0.0,
    )


def next_wave(
    seed_ids: Iterable[str],
    tokens: Mapping[Key, int],
    budget: int,
    expected_tokens: float,
    engines: int,
    max_sequences: int,
    salt: str | None = None,
) -> list[Key]:
    """Return the unfinished requests to sample next: up to where the budget should be reached by the mean so far.

    Before anything is finished the mean is a guess, so the first wave aims at a part of the budget.
    """
    total = sum(tokens.values())
    mean = total / len(tokens) if total else max(expected_tokens, 1)
    aim = budget if total else budget * FIRST_WAVE
    least, most = MIN_WAVE_PER_ENGINE * engines, SEQUENCES_PER_WAVE * max_sequences * engines
    wave: list[Key] = []
    reached = 0.0
    for key in request_order(seed_ids, salt):
        if len(wave) >= most or (reached >= aim and len(wave) >= least):
            break
        if key not in tokens:
            wave.append(key)
        reached += tokens.get(key, mean)
    return wave


def shard_budget(seed_tokens: int, repetitions: float, synthetic_share: float) -> int:
    """Return the synthetic tokens of a shard: its share of the SBP arm's budget, by the tokens of D that it holds."""
    return math.floor(synthetic_share * repetitions * seed_tokens)
