"""A corpus that cannot be opened or listed is a CorpusError that names the path, whatever its file system raises."""

import pytest
from fsspec.registry import known_implementations

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.source_files import Root

UNOPENED = ["github://a/b", "dir://x", "zip://x", "reference://x", "blockcache://x", "nowhere://x"]
UNLISTED = ["http://127.0.0.1:1/x", "http://127.0.0.1:1/*.jsonl", "ftp://127.0.0.1:1/x", "data://x"]


@pytest.mark.parametrize("path", UNOPENED + UNLISTED)
def test_whatever_a_file_system_raises_names_the_path(path: str, monkeypatch: pytest.MonkeyPatch):
    lacking = {"class": "no_such_package.Files", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "nowhere", lacking)
    with pytest.raises(CorpusError) as refused:
        Root(path).files()
    assert f"corpus.source.path {path!r} cannot be opened: " in str(refused.value)
    assert path != "nowhere://x" or "Please install no_such_package" in str(refused.value)
