from pathlib import Path

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.training.rows import IGNORED, Rows, heldout_rows
from sbp_assets.training.spec import Source
from sbp_assets_tests.training.conftest import LENGTHS, write_documents


@given(counts=LENGTHS, limit=st.integers(1, 200))
def test_heldout_rows_predict_each_token_once_up_to_the_limit(tmp_path_factory, counts, limit):
    source = write_documents(tmp_path_factory.mktemp("order"), counts, 100)
    rows = heldout_rows([source], 16, limit)
    flat = np.concatenate([np.full(n, 100 + i) for i, n in enumerate(counts)])[: limit + 1]
    expected = flat[1:][flat[1:] == flat[:-1]]
    assert rows.labels[rows.labels != IGNORED].tolist() == expected.tolist()


def test_heldout_examples_stay_whole_and_count_only_what_follows_the_prompt(tmp_path: Path):
    examples = [np.array([0, 10, 11, 3, 20, 21, 1]), np.array([0, 12, 3, 22, 23, 24, 1]), np.array([0, 13, 3, 25, 1])]
    prompts = [4, 3, 3]
    frame = pl.DataFrame({"id": ["a", "b", "c"], "prompt_tokens": prompts})
    write_token_arrays(tmp_path / "examples", frame, examples, 32)
    rows = heldout_rows([Source(directory=tmp_path / "examples")], 8, 1000)
    labels = [row[row != IGNORED].tolist() for row in rows.labels]
    assert labels == [[20, 21, 1], [22, 23, 24, 1], [25, 1]]
    assert [row[:3].tolist() for row in rows.input_ids] == [[0, 10, 11], [0, 12, 3], [0, 13, 3]]


@given(counts=LENGTHS, parts=st.integers(1, 5), unlabelled=st.sets(st.integers(0, 11)))
def test_pieces_hold_every_document_with_a_label_once_and_are_about_equal(counts, parts, unlabelled):
    documents = [np.full(count, 100 + number) for number, count in enumerate(counts)]
    ids = np.concatenate(documents)[None]
    positions = np.concatenate([np.arange(count) for count in counts])[None]
    kept = [number for number in range(len(counts)) if number not in unlabelled]
    labels = np.where(np.isin(ids - 100, kept), ids, IGNORED)
    pieces = Rows(ids, positions, labels).pieces(parts)
    assert len(pieces) == parts
    expected = np.concatenate([documents[number] for number in kept] or [np.empty(0, np.int64)])
    assert np.concatenate([piece.input_ids[0] for piece in pieces]).tolist() == expected.tolist()
    assert np.concatenate([piece.labels[0] for piece in pieces]).tolist() == expected.tolist()
    for piece in pieces:
        # Whole documents, none of them more off the equal share than by the longest.
        assert not piece.position_ids.size or piece.position_ids[0, 0] == 0
        assert abs(piece.input_ids.size - len(expected) / parts) <= max(counts)
