import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.training.order import ExamplesOrder, StreamOrder
from sbp_assets.training.rows import IGNORED, Rows
from sbp_assets.training.spec import ExamplesData, StreamData
from sbp_assets_tests.training.conftest import LENGTHS, write_documents

CONTEXT = 16


def stream(tmp: Path, repeated: list[int], once: list[int], epochs: int, seed: int = 0) -> StreamOrder:
    data = StreamData(
        repeated=[write_documents(tmp / "repeated", repeated, 100)] if repeated else [],
        once=[write_documents(tmp / "once", once, 1000)] if once else [],
        passes=epochs,
    )
    return StreamOrder(data, CONTEXT, seed)


def equal(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "position_ids", "labels"))


@given(repeated=LENGTHS, once=LENGTHS, epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_epochs_read_repeated_documents_once_each_and_once_documents_once_overall(
    tmp_path_factory, repeated, once, epochs, seed
):
    order = stream(tmp_path_factory.mktemp("order"), repeated, once, epochs, seed)
    tokens = epochs * sum(repeated) + sum(once)
    read = order.rows(0, -(-tokens // CONTEXT)).input_ids.ravel()
    expected = {100 + i: epochs * n for i, n in enumerate(repeated)} | {1000 + i: n for i, n in enumerate(once)}
    assert Counter(read[:tokens].tolist()) == expected
    # The once documents are spread over the epochs, in equal slices.
    slices = [sum(i >= len(repeated) for i in order.epoch_documents(k)) for k in range(epochs + 1)]
    assert max(slices[:-1]) - min(slices[:-1]) <= 1 and slices[-1] == 0
    for k in range(epochs + 2):
        assert sorted(i for i in order.epoch_documents(k) if i < len(repeated)) == list(range(len(repeated)))


@given(
    repeated=LENGTHS,
    once=LENGTHS,
    epochs=st.integers(1, 4),
    seed=st.integers(0, 5),
    tokens=st.integers(1, 2000),
)
def test_reading_tells_which_document_every_token_of_the_rows_is_from(
    tmp_path_factory, repeated, once, epochs, seed, tokens
):
    order = stream(tmp_path_factory.mktemp("order"), repeated, once, epochs, seed)
    ids = order.rows(0, -(-tokens // CONTEXT)).input_ids.ravel()[:tokens]
    told = np.zeros(tokens, np.int64)
    for documents, starts, counts in order.reading(tokens):
        for document, start, count in zip(documents, starts, counts, strict=True):
            told[start : start + count] = (
                100 + document if document < len(repeated) else 1000 + document - len(repeated)
            )
    assert np.array_equal(told, ids)


@given(
    repeated=LENGTHS,
    once=LENGTHS,
    start=st.integers(0, 30),
    count=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_stream_rows_are_a_pure_function_of_seed_and_index(tmp_path_factory, repeated, once, start, count, seed):
    tmp = tmp_path_factory.mktemp("order")
    whole = stream(tmp, repeated, once, 2, seed).rows(0, start + count)
    assert equal(whole.part(start, start + count), stream(tmp, repeated, once, 2, seed).rows(start, start + count))


@given(repeated=LENGTHS, seed=st.integers(0, 3))
def test_stream_labels_are_the_next_token_of_the_same_document_and_positions_restart(tmp_path_factory, repeated, seed):
    order = stream(tmp_path_factory.mktemp("order"), repeated, [], 3, seed)
    count = -(-3 * sum(repeated) // CONTEXT)
    rows = order.rows(0, count)
    # The document each token belongs to, numbered along the stream.
    stream_lengths = [repeated[i] for k in range(4 + CONTEXT) for i in order.epoch_documents(k)]
    owner = np.repeat(np.arange(len(stream_lengths)), stream_lengths)[: count * CONTEXT + 1]
    within = np.concatenate([np.arange(n) for n in stream_lengths])[: count * CONTEXT]
    flat = order.rows(0, count + 1).input_ids.ravel()[: count * CONTEXT + 1]
    assert np.array_equal(rows.labels.ravel(), np.where(owner[1:] == owner[:-1], flat[1:], IGNORED))
    columns = np.tile(np.arange(CONTEXT), count)
    assert np.array_equal(rows.position_ids.ravel(), np.minimum(within, columns))


@given(repeated=LENGTHS, once=LENGTHS, epochs=st.integers(1, 4), seed=st.integers(0, 5), piece=st.integers(1, 9))
def test_the_order_is_that_of_numpys_permutations_in_memory(tmp_path_factory, repeated, once, epochs, seed, piece):
    """Results of record depend on it: whatever is mapped and cut into pieces, the order stays as it always was."""
    tmp = tmp_path_factory.mktemp("order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sbp_assets.training.mapped.PIECE", piece)
        order = stream(tmp, repeated, once, epochs, seed)
        spread = np.random.default_rng([seed, 0]).permutation(len(once)) + len(repeated)
        cuts = np.linspace(0, len(once), epochs + 1).astype(int)
        for number in range(epochs + 1):
            documents = np.arange(len(repeated))
            if number < epochs:
                documents = np.concatenate([documents, spread[cuts[number] : cuts[number + 1]]])
            expected = np.random.default_rng([seed, 1, number]).permutation(documents)
            assert order.epoch_documents(number).tolist() == expected.tolist()


def test_processes_share_an_index_until_the_data_changes(tmp_path: Path):
    data = StreamData(repeated=[write_documents(tmp_path / "data", [5, 9, 7], 100)], passes=3)
    folder = tmp_path / "index"
    first = StreamOrder(data, CONTEXT, 0, folder)
    rows = first.rows(0, 9)
    # Nine rows end in the seventh epoch: of those long over nothing is left on the disk.
    assert not [path for number in range(4) for path in folder.rglob(f"epoch {number}*")]
    index = next(folder.rglob("repeated.starts"))
    before = index.stat().st_ino
    second = StreamOrder(data, CONTEXT, 0, folder)
    assert equal(second.rows(0, 3), rows.part(0, 3)) and second.digest(200) == first.digest(200)
    assert index.stat().st_ino == before, "it was there"
    assert equal(rows, StreamOrder(data, CONTEXT, 0).rows(0, 9)), "as without a folder"
    assert StreamOrder(data, CONTEXT, 1, folder).epoch_documents(0).tolist() != []
    assert len(list(folder.iterdir())) == 1, "the index of another seed takes the place of the first"
    write_documents(tmp_path / "data", [5, 9, 8], 100)
    assert StreamOrder(data, CONTEXT, 1, folder).sizes == [3]
    assert equal(StreamOrder(data, CONTEXT, 1, folder).rows(0, 4), StreamOrder(data, CONTEXT, 1).rows(0, 4))
    assert equal(first.rows(0, 1), rows.part(0, 1)), "who has mapped the old one goes on with it"


def test_every_epoch_has_its_own_order(tmp_path: Path):
    order = stream(tmp_path, [5] * 12, [], 3)
    assert not np.array_equal(order.epoch_documents(0), order.epoch_documents(1))


def test_finite_stream_ends_with_an_error(tmp_path: Path):
    order = stream(tmp_path, [], [CONTEXT, CONTEXT], 1)
    assert order.total_rows == 2
    assert order.rows(1, 2).labels[0, -1] == IGNORED
    with pytest.raises(ValueError, match="ends after 32 tokens"):
        order.rows(2, 3)


def test_a_far_step_costs_one_epoch_not_all_before_it(tmp_path: Path):
    order = stream(tmp_path, [7] * 50, [9] * 30, 4)
    order.rows(1_000_000, 1_000_001)
    assert order._epoch.cache_info().misses <= 2


@given(counts=st.lists(st.integers(2, CONTEXT), min_size=1, max_size=15), epochs=st.sampled_from([0.5, 1, 1.4, 3]))
def test_examples_are_whole_supervised_after_the_prompt_and_read_once_per_epoch(tmp_path_factory, counts, epochs):
    prompts = [max(1, n // 2) for n in counts]
    source = write_documents(tmp_path_factory.mktemp("order"), counts, 100, prompt_tokens=prompts)
    if round(epochs * len(counts)) == 0:
        return
    order = ExamplesOrder(ExamplesData(source=source, epochs=epochs), CONTEXT, 3, pad=2)
    rows = order.rows(0, order.total_rows + 2)
    assert (rows.labels[order.total_rows :] == IGNORED).all() and (rows.input_ids[order.total_rows :] == 2).all()
    whole = Counter({i: int(epochs) for i in range(len(counts)) if epochs >= 1})
    if rest := round((epochs % 1) * len(counts)):
        whole.update(np.random.default_rng([3, 1, int(epochs)]).permutation(len(counts))[:rest].tolist())
    assert Counter(rows.input_ids[rows.input_ids != 2].tolist()) == {100 + i: n * counts[i] for i, n in whole.items()}
    assert Counter(order.documents(0, order.total_rows)) == {str(i): n for i, n in whole.items()}
    # Each example gives a label for each token after its prompt.
    labels = Counter(rows.labels[rows.labels != IGNORED].tolist())
    assert labels == {100 + i: n * (counts[i] - prompts[i]) for i, n in whole.items() if counts[i] > prompts[i]}
    starts = rows.position_ids[:, 1:] == 0
    changes = rows.input_ids[:, 1:] != rows.input_ids[:, :-1]
    assert (starts | ~changes).all()
    alone = [order.rows(r, r + 1) for r in range(order.total_rows)]
    assert all(equal(rows.part(r, r + 1), row) for r, row in enumerate(alone))


def test_reads_of_an_example_follow_the_epochs(tmp_path: Path):
    source = write_documents(tmp_path, [5] * 10, 0, prompt_tokens=[1] * 10)
    order = ExamplesOrder(ExamplesData(source=source, epochs=2.5), CONTEXT, seed=3, pad=0)
    reads = [order.reads(example) for example in range(10)]
    assert sorted(reads) == [2] * 5 + [3] * 5
    assert [example for example in range(10) if reads[example] == 3] == sorted(order.epoch_examples(2).tolist())


def test_examples_refuse_what_does_not_fit(tmp_path: Path):
    long = write_documents(tmp_path / "long", [4, CONTEXT + 1], 100, prompt_tokens=[2, 2])
    with pytest.raises(ValueError, match="example 1 has 17 tokens, above the context length 16"):
        ExamplesOrder(ExamplesData(source=long), CONTEXT, 0, pad=2)
    with pytest.raises(ValueError, match="no prompt_tokens column"):
        ExamplesOrder(ExamplesData(source=write_documents(tmp_path / "plain", [4], 100)), CONTEXT, 0, pad=2)


@given(repeated=LENGTHS, once=LENGTHS, epochs=st.integers(1, 4), start=st.integers(0, 8), count=st.integers(1, 4))
def test_documents_are_those_whose_tokens_are_in_the_rows(tmp_path_factory, repeated, once, epochs, start, count):
    order = stream(tmp_path_factory.mktemp("order"), repeated, once, epochs, 0)
    ids = order.rows(start, start + count).input_ids.ravel()
    # A token says whose it is, and an id is the document's number in its source. A document may be read twice in a row.
    read = [name for name, _ in itertools.groupby(str(int(i) - (1000 if i >= 1000 else 100)) for i in ids)]
    assert [name for name, _ in itertools.groupby(order.documents(start, start + count))] == read
