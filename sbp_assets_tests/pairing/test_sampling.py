"""Which shards a check reads beside its own, and that what it finds is as likely as docs/checks.md says.

The draws are hashes of fixed keys: every figure here is the same in every run.
"""

from __future__ import annotations

from collections import Counter
from math import comb, exp
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.pairing.audit import PAIRS_SAMPLE, sampled_shards, seed_of
from sbp_assets.settings import Deployment

PAGE = Path(__file__).parents[2] / "docs" / "checks.md"
OTHERS = Deployment().checked_shards
KEYS = [f"{shard:05d}" for shard in range(512)]


def missed_places(shards: int, wrong: int, read: int = OTHERS) -> float:
    """Return how likely one shard's check reads none of `wrong` other shards, of `shards` in all."""
    read = min(read, shards - 1)
    return comb(shards - 1 - wrong, read) / comb(shards - 1, read)


def missed_by_all(shards: int, wrong: int, read: int = OTHERS) -> float:
    """Return how likely the checks of `wrong` shards, each with one place in another shard, all read past it."""
    return missed_places(shards, 1, read) ** wrong


def missed_rows(share: float, rows: int = PAIRS_SAMPLE) -> float:
    """Return how likely a sample of `rows` from very many holds none of the wrong `share`."""
    return (1 - share) ** rows


@given(st.sets(st.text("0123456789", min_size=1, max_size=6)), st.text("0123456789", min_size=1, max_size=6), st.data())
def test_one_more_shard_replaces_at_most_one(others: set[str], shard: str, data: st.DataObject) -> None:
    more = data.draw(st.text("0123456789", min_size=1, max_size=6))
    before, after = (
        sampled_shards(shard, others, OTHERS),
        sampled_shards(shard, {*others, more}, OTHERS),
    )
    assert shard not in before and set(before) <= others and len(set(before)) == len(before)
    assert len(before) == min(OTHERS, len(others - {shard}))
    assert set(after) <= {*before, more} and len(set(before) - set(after)) <= 1
    assert sampled_shards(shard, sorted(others, reverse=True), OTHERS) == before


def test_no_two_shards_read_the_same_and_all_are_read() -> None:
    samples = {shard: tuple(sampled_shards(shard, KEYS, OTHERS)) for shard in KEYS}
    assert len({frozenset(sample) for sample in samples.values()}) == len(KEYS)
    times = Counter(other for sample in samples.values() for other in sample)
    assert set(times) == set(KEYS) and max(times.values()) < 3 * OTHERS
    assert samples["00000"][:2] == ("00096", "00384")


def deviation(share: float, draws: int) -> float:
    return 5 * (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize("shards", [16, 64, 512])
@pytest.mark.parametrize("wrong", [1, 2, 5])
def test_wrong_rows_of_one_shard_are_found_as_often_as_stated(shards: int, wrong: int) -> None:
    keys, found, draws = KEYS[:shards], 0, 0
    for place, shard in enumerate(keys):
        read = set(sampled_shards(shard, keys, OTHERS))
        for step in range(1, shards - wrong, wrong):
            places = {keys[(place + step + i) % shards] for i in range(wrong)}
            found, draws = found + bool(read & places), draws + 1
    # A shard's draws depend on each other: without replacement, so that their mean varies less than if independent.
    expected = 1 - missed_places(shards, wrong)
    assert abs(found / draws - expected) <= deviation(expected, draws)


@pytest.mark.parametrize("wrong", [2, 8, 32])
def test_rows_wrong_in_several_shards_are_found_as_often_as_stated(wrong: int) -> None:
    read = {shard: set(sampled_shards(shard, KEYS, OTHERS)) for shard in KEYS}
    # In `wrong` consecutive shards one row each, whose place lies `step` shards further.
    found = [
        any(KEYS[(first + i + step) % len(KEYS)] in read[KEYS[(first + i) % len(KEYS)]] for i in range(wrong))
        for step in range(1, 512, 5)
        for first in range(0, len(KEYS), wrong)
    ]
    expected = 1 - missed_by_all(len(KEYS), wrong)
    assert abs(sum(found) / len(found) - expected) <= deviation(expected, len(found))


@pytest.mark.parametrize("read", [1, 2, 4])
def test_a_shard_that_is_wrong_itself_is_found_by_one_of_the_others_as_often_as_stated(read: int) -> None:
    seen = {other for shard in KEYS for other in sampled_shards(shard, KEYS, read)}
    expected = 1 - missed_by_all(len(KEYS), len(KEYS) - 1, read)
    assert abs(expected - (1 - exp(-read))) < 0.002
    assert abs(len(seen) / len(KEYS) - expected) <= deviation(expected, len(KEYS))


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_wrong_rows_are_in_the_sample_as_often_as_stated(share: float) -> None:
    rows = pl.DataFrame({"row": range(20_000)})
    wrong = round(share * len(rows))
    found = [bool((rows.sample(PAIRS_SAMPLE, seed=seed_of(key))["row"] < wrong).any()) for key in KEYS]
    expected = 1 - missed_rows(share)
    assert abs(sum(found) / len(found) - expected) <= deviation(expected, len(found))


def table() -> str:
    lines = []
    for shards in (9, 32, 128, 1024, 8192):
        one = 1 - missed_places(shards, 1)
        ten = 1 - missed_places(shards, min(10, shards - 1))
        tenth = 1 - missed_by_all(shards, -(-shards // 10))
        whole = 1 - missed_by_all(shards, shards - 1)
        lines.append(f"| {shards:,} | {one:.1%} | {ten:.1%} | {tenth:.1%} | {whole:.2%} |")
    return "\n".join(lines)


def test_the_docs_state_these_probabilities() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page, table()
    for share in (0.01, 0.03, 0.05):
        assert f"{1 - missed_rows(share):.0%} where {share:.0%}" in page
