from __future__ import annotations

from collections import Counter

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus.split import split_documents, split_of
from sbp_assets.settings import Split

SPLIT = Split(unique=0.3, oracle=0.4, heldout=0.1)


@given(st.text(), st.floats(0, 0.6), st.floats(0, 0.6))
def test_law_the_oracle_share_moves_no_document_of_the_other_splits(name: str, one: float, other: float) -> None:
    first, second = (split_of(name, SPLIT.model_copy(update={"oracle": share})) for share in (one, other))
    assert first == second or {first, second} == {"oracle", None}


@given(st.lists(st.text(min_size=1), unique=True), st.data())
def test_law_a_document_keeps_its_split_whatever_its_shard(ids: list[str], data: st.DataObject) -> None:
    some = [name for name in ids if data.draw(st.booleans())]
    none = pl.DataFrame(schema={"id": pl.String, "shard": pl.Int64})
    whole, part = (
        dict(split_documents(pl.DataFrame({"id": n}, schema={"id": pl.String}), none, 0, SPLIT).rows())
        for n in (ids, some)
    )
    assert part == {name: whole[name] for name in some if name in whole}


def test_shares_and_salt() -> None:
    names = [str(i) for i in range(5000)]
    counts = Counter(split_of(name, SPLIT) for name in names)
    for name, share in (("unique", 0.3), ("oracle", 0.4), ("heldout", 0.1), (None, 0.2)):
        assert abs(counts[name] / 5000 - share) < 0.03
    resalted = SPLIT.model_copy(update={"salt": "other"})
    assert any(split_of(name, SPLIT) != split_of(name, resalted) for name in names)


def test_duplicates_of_this_shard_only_are_dropped() -> None:
    everything = Split(unique=0.5, oracle=0, heldout=0.5)
    documents = pl.DataFrame({"id": ["a", "b"]})
    dropped = pl.DataFrame({"id": ["a", "b"], "shard": [0, 1]})
    assert split_documents(documents, dropped, 0, everything)["id"].to_list() == ["b"]
