from pathlib import Path

import numpy as np
import pytest

from sbp_assets.training.documents import Documents
from sbp_assets.training.order import StreamOrder
from sbp_assets.training.spec import StreamData
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
