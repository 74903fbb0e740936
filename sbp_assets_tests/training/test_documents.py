from pathlib import Path

import numpy as np
import pytest

from sbp_assets.training.documents import Documents
from sbp_assets.training.mapped import MappedArrays
from sbp_assets.training.order import ExamplesOrder, StreamOrder
from sbp_assets.training.spec import ExamplesData, StreamData
from sbp_assets_tests.training.conftest import write_documents


def test_only_the_asked_split_is_read(tmp_path: Path):
    source = write_documents(tmp_path, [3, 4, 5], 100, split=["unique", "oracle", "unique"])
    assert Documents([source.model_copy(update={"split": "unique"})]).lengths.tolist() == [3, 5]
    with pytest.raises(ValueError, match="no tokens to train on"):
        StreamOrder(StreamData(repeated=[source.model_copy(update={"split": "none"})]), 16, 0)


def test_digest_sees_every_token_the_split_and_foreign_vocabularies(tmp_path: Path):
    a, b = write_documents(tmp_path / "a", [3, 4], 100), write_documents(tmp_path / "b", [3, 4], 100)
    assert Documents([a]).digest(200) == Documents([b]).digest(200)
    tokens = np.load(tmp_path / "b" / "tokens.npy")
    tokens[-1] += 1
    np.save(tmp_path / "b" / "tokens.npy", tokens)
    assert Documents([a]).digest(200) != Documents([b]).digest(200)
    with pytest.raises(ValueError, match="token id 101 in the data is outside the tokenizer's vocabulary of 101"):
        Documents([a]).digest(101)


def test_a_document_is_found_by_its_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sbp_assets.training.documents.PIECE", 2)
    split = ["unique", "oracle", "unique", "unique", "oracle"]
    sources = [write_documents(tmp_path / name, [3, 4, 5, 6, 2], 100, split=split) for name in "ab"]
    documents = Documents([source.model_copy(update={"split": "unique"}) for source in sources])
    assert documents.lengths.tolist() == [3, 5, 6] * 2
    assert documents.names(np.array([5, 0, 2, 1])) == ["3", "0", "3", "2"]
    for source in sources:  # Of the files of a directory, that of the tokens is all that is read then.
        (source.directory / "offsets.npy").unlink()
    assert [documents.read(n, 1, 3).tolist() for n in (0, 1, 5)] == [[100, 100], [102, 102], [103, 103]]


def test_temporary_files_are_in_the_folder_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_documents(tmp_path / "data", [3, 4], 100, prompt_tokens=[1, 2])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    order = ExamplesOrder(ExamplesData(source=source, epochs=1), 16, 0, 0, tmp_path / "work/index")
    assert order.total_rows == 1
    scratch = MappedArrays(scratch=tmp_path / "scratch")
    assert Documents([source], scratch).lengths.tolist() == [3, 4]
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(FileNotFoundError, match="none"):
        Documents([source])
