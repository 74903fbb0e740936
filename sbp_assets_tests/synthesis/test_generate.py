"""The prefix rule, request order and the ledger, without engines."""

import dataclasses
import json
import random
from collections import Counter
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.settings import Synthesis
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.engine import EngineError, Engines, EngineSpec, Generator
from sbp_assets.synthesis.generate import (
    SEQUENCES_PER_WAVE,
    Outcome,
    SynthesisError,
    budget_prefix,
    generate_shard,
    next_wave,
    request_order,
    sampling_seed,
)
from sbp_assets.synthesis.ledger import Ledger
from sbp_assets_tests.synthesis.test_ledger import RECORD, count_bytes

# Of the engine that is installed everywhere; stand-ins take its place here.
SPEC = EngineSpec("transformers", Path("model"), "v1", 64, "float32", "cpu", 2, 4, 0.9)


def outputs(salt: int, key: tuple[str, int]) -> str:
    """A stand-in synthesis: a pure function of the request, empty now and then."""
    return "x" * random.Random(f"{salt}-{key}").randrange(0, 30)


class PureEngines:
    """Finishes requests in random order, and may die after some of them."""

    def __init__(self, salt: int, order: random.Random, dies_after: int | None = None) -> None:
        self.salt, self.order, self.left = salt, order, dies_after
        self.startup_seconds = 1.0
        self.asked: list[tuple[str, int]] = []

    def generate(self, requests, sampling, ledgers, poll) -> None:
        shuffled = list(requests)
        self.order.shuffle(shuffled)
        for request in shuffled:
            if self.left is not None and self.left <= 0:
                raise RuntimeError("killed")
            self.left = None if self.left is None else self.left - 1
            key = (request.seed_id, request.rollout)
            self.asked.append(key)
            row = {
                "seed_id": key[0],
                "rollout": key[1],
                "sampling_seed": request.sampling_seed,
                "text": outputs(self.salt, key),
                "finish_reason": "stop",
            }
            with self.order.choice(ledgers).open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        poll()


class Running:
    """A generator whose engines run already."""

    def __init__(self, engines: PureEngines) -> None:
        self._engines = engines

    def engines(self, spec: EngineSpec) -> tuple[PureEngines, bool]:
        return self._engines, False


class NeverStarted(Generator):
    """A generator that no test should ask for engines."""

    def engines(self, spec: EngineSpec) -> tuple[Engines, bool]:
        pytest.fail("an engine was started")


def run(directory: Path, engines: PureEngines, seeds: list[str], budget: int, order: str = "in_turn"):
    with Progress("test", "tokens", seconds=1e9) as progress:
        prompts = {seed: [0, 1] for seed in seeds}
        ledger = Ledger(directory, count_bytes)
        synthesis = Synthesis(seed_order=order)
        return generate_shard(prompts, budget, 15, Running(engines), SPEC, synthesis, 1, ledger, progress)


def test_request_order_is_rollout_by_rollout() -> None:
    assert list(islice(request_order(["b", "a"]), 5)) == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert list(request_order([])) == list(request_order([], "salt")) == []


def test_seeds_are_drawn_uniformly_at_random_with_a_salt() -> None:
    ids = [f"d{number}" for number in range(40)]
    drawn = list(islice(request_order(ids, "salt"), 8000))
    for place, (seed_id, rollout) in enumerate(drawn[:200]):
        assert rollout == sum(earlier == seed_id for earlier, _ in drawn[:place]), "rollouts count up from 0"
    counts = Counter(seed_id for seed_id, _ in drawn)
    # The mean squared deviation of multinomial counts is their mean; of those of seeds in turn it is 0.
    assert 100 < sum((counts[seed_id] - 200) ** 2 for seed_id in ids) / len(ids) < 320
    neighbours = sum(one[0] == other[0] for one, other in pairwise(drawn))
    assert 120 < neighbours < 280, "a draw does not depend on the one before: 200 of 8,000 repeat it"


def test_the_random_order_of_two_seeds_does_not_depend_on_the_others() -> None:
    ids = [f"d{number}" for number in range(20)]
    drawn = list(islice(request_order(reversed(ids), "salt"), 1000))
    assert drawn == list(islice(request_order(ids, "salt"), 1000))
    assert drawn != list(islice(request_order(ids, "pepper"), 1000))
    few = {"d3", "d7"}
    kept = [key for key in drawn if key[0] in few]
    assert kept == list(islice(request_order(few, "salt"), len(kept)))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    seeds=st.integers(1, 7),
    budget=st.integers(0, 200),
    order=st.randoms(use_true_random=False),
    salt=st.sampled_from([None, "salt"]),
)
def test_prefix_is_shortest_and_ignores_completion_order(lengths, seeds, budget, order, salt) -> None:
    ids = [f"d{number}" for number in range(seeds)]
    keys = list(islice(request_order(ids, salt), len(lengths)))
    items = list(zip(keys, lengths, strict=True))
    order.shuffle(items)
    order.shuffle(ids)
    prefix, met = budget_prefix(ids, dict(items), budget, salt)
    assert prefix == keys[: len(prefix)]
    total = sum(lengths[: len(prefix)])
    if met:
        assert total >= budget and (not prefix or total - lengths[len(prefix) - 1] < budget)
    else:
        assert len(prefix) == len(lengths) and total < budget
    # More finished requests behind the prefix change nothing.
    further = dict(items) | {key: 5 for key in islice(request_order(ids, salt), len(lengths), len(lengths) + 9)}
    if met:
        assert budget_prefix(ids, further, budget, salt) == (prefix, True)


@given(
    salt=st.integers(0, 99),
    seeds=st.integers(1, 9),
    budget=st.integers(0, 1500),
    kills=st.lists(st.integers(0, 40), max_size=4),
    order=st.sampled_from(["in_turn", "random"]),
)
@settings(deadline=None)  # It writes and reads files: how long that takes says nothing.
def test_rows_are_a_pure_function_of_the_outputs(tmp_path_factory, salt, seeds, budget, kills, order) -> None:
    """Whatever the order of completion, and however often a run is killed, the rows are the same."""
    ids = [f"d{number}" for number in range(seeds)]
    whole = run(tmp_path_factory.mktemp("whole") / "f", PureEngines(salt, random.Random(1)), ids, budget, order)
    directory = tmp_path_factory.mktemp("killed") / "f"
    asked: list[tuple[str, int]] = []
    for attempt, kill in enumerate([*kills, None]):
        engines = PureEngines(salt, random.Random(attempt), kill)
        with suppress(RuntimeError):
            outcome = run(directory, engines, ids, budget, order)
        asked += engines.asked
    assert outcome.rows.equals(whole.rows)
    assert len(asked) == len(set(asked)), "nothing is sampled twice"
    tokens = outcome.rows["n_tokens"]
    assert tokens.sum() >= budget and (budget == 0 or tokens.sum() - tokens[-1] < budget)
    assert outcome.empty == outcome.requests - len(outcome.rows)
    assert (outcome.rows["text"].str.len_chars() > 0).all()


def test_waves_discard_little(tmp_path: Path) -> None:
    outcome = run(tmp_path / "f", PureEngines(0, random.Random(0)), ["a", "b", "c"], 20_000)
    assert outcome.discarded < 0.05 * outcome.requests


def test_next_wave_fills_holes_first() -> None:
    assert next_wave(["a", "b"], {("a", 0): 10, ("a", 1): 10}, 30, 10, 1, 100)[0] == ("b", 0)
    assert len(next_wave(["a"], {}, 10**9, 10, 1, 2)) == SEQUENCES_PER_WAVE * 2


def test_sampling_seeds_are_stable_and_differ() -> None:
    assert sampling_seed("sbp", "d1", 0) == 7102362567349950820
    seeds = {sampling_seed(salt, seed, rollout) for salt in "ab" for seed in ("d1", "d10") for rollout in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_shard_whose_engine_is_gone_says_so_where_it_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ledger = Ledger(tmp_path / "00007" / "f", count_bytes)
    ledger.session_files(1)[0].write_text(json.dumps(RECORD) + "\n")
    ledger.refresh()
    spec = dataclasses.replace(SPEC, engine="vllm")

    def finish(budget: int) -> Outcome:
        with Progress("test", "tokens") as progress:
            return generate_shard({"a": [0, 1]}, budget, 5, NeverStarted(), spec, Synthesis(), 1, ledger, progress)

    assert finish(6).rows["engine"].to_list() == ["vllm"], "finished without an engine"
    other = tmp_path / "00007" / "of-transformers"
    other.mkdir()
    with pytest.raises(EngineError, match=r"00007 was begun by vllm \(1 finished\).*VLLM=auto.*=transformers"):
        finish(7)
    assert other.exists(), "nothing has taken its place"


def test_impossible_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SynthesisError, match="no seed document"):
        run(tmp_path / "a", PureEngines(0, random.Random(0)), [], 10)
    monkeypatch.setattr(f"{__name__}.outputs", lambda salt, key: " ")
    with pytest.raises(SynthesisError, match="all empty"):
        run(tmp_path / "b", PureEngines(0, random.Random(0)), ["a"], 10)
    with (
        Progress("test", "tokens") as progress,
        pytest.raises(SynthesisError, match=r"document long.*max_document_tokens"),
    ):
        generate_shard(
            {"long": [0] * 64},
            10,
            1,
            NeverStarted(),
            SPEC,
            Synthesis(),
            1,
            Ledger(tmp_path / "c", count_bytes),
            progress,
        )


def test_empty_shard_gives_an_empty_table(tmp_path: Path) -> None:
    with Progress("test", "tokens") as progress:
        outcome = generate_shard(
            {}, 0, 0.0, NeverStarted(), SPEC, Synthesis(), 1, Ledger(tmp_path / "f", count_bytes), progress
        )
    assert outcome.rows.is_empty() and outcome.rows.schema["n_tokens"].is_integer()
