"""What lies under a corpus path is read, or named with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.source_files import Root

ROW = '{"text": "some words"}\n'


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW)


def link(target: Path | str, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    name.symlink_to(target)


def files(path: Path | str) -> tuple[list[str], dict[str, str]]:
    return Root(str(path)).files()


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".txt"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst", ".zstd"])
def test_known_endings_are_read_in_any_case_and_others_are_named(tmp_path: Path, kind: str, packing: str) -> None:
    names = [f"a{kind}{packing}", f"B{kind}{packing}".upper()]
    put(tmp_path, *names, "z.jsonl", "notes.md", "a.jsonl.part", "a.jsonl.gz.md5", "LICENSE")
    found, left_out = files(tmp_path)
    bare = (kind, packing) == (".json", "")
    assert found == ([*sorted(names), "z.jsonl"] if not bare else ["z.jsonl"])
    others = ["LICENSE", "a.jsonl.gz.md5", "a.jsonl.part", "notes.md", *(names if bare else [])]
    assert left_out == dict.fromkeys(sorted(others), "unknown ending")


def test_hidden_files_are_named_and_a_hidden_folder_is_one_entry(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "_b.jsonl", "x/.c.jsonl", ".git/d.jsonl", ".git/e.jsonl", "x/_tmp/y/f.jsonl")
    found, left_out = files(tmp_path)
    assert found == ["a.jsonl"]
    assert list(left_out) == [".git/", "_b.jsonl", "x/.c.jsonl", "x/_tmp/"]
    assert {reason.partition(":")[0] for reason in left_out.values()} == {"hidden"}
    assert files(tmp_path / "_b.jsonl") == (["_b.jsonl"], {}), "named by hand"


def test_names_that_are_not_utf8_are_left_out_and_the_others_read(tmp_path: Path) -> None:
    put(tmp_path, "b.jsonl")
    folder = os.fsencode(tmp_path)
    os.mkdir(folder + b"/caf\xe9")
    for name in (b"/caf\xe9.jsonl", b"/caf\xe9/a.jsonl"):
        Path(os.fsdecode(folder + name)).write_text(ROW)
    found, left_out = files(tmp_path)
    assert found == ["b.jsonl"]
    assert left_out == dict.fromkeys([r"caf\xe9.jsonl", r"caf\xe9/"], "its name is not UTF-8")


def test_a_file_that_links_reach_twice_is_read_once_by_its_own_name(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    put(corpus, "real/a.jsonl")
    put(tmp_path, "elsewhere/b.jsonl", "elsewhere/blob", "elsewhere/_c.jsonl")
    link("real/a.jsonl", corpus / "0-first-by-name.jsonl")
    link("real", corpus / "0-again")
    for name in ("one", "two"):
        link(tmp_path / "elsewhere", corpus / name)
        link(tmp_path / "elsewhere/blob", corpus / f"{name}.jsonl")
    link(tmp_path / "elsewhere/_c.jsonl", corpus / "c.jsonl")
    found, left_out = files(corpus)
    assert found == ["c.jsonl", "one.jsonl", "one/b.jsonl", "real/a.jsonl"]
    assert left_out == {
        "0-again/": "a link: it leads to real, which is read",
        "0-first-by-name.jsonl": "a link: it leads to real/a.jsonl, which is read",
        "one/_c.jsonl": "hidden: its name begins with . or _",
        "one/blob": "unknown ending",
        "two.jsonl": "a link: it leads to one.jsonl, which is read",
        "two/": "a link: it leads to one, which is read",
    }


def test_links_in_a_circle_or_to_nothing_are_named(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    put(corpus, "x/a.jsonl")
    link(corpus, corpus / "x/up")
    link("..", corpus / "x/parent")
    link("itself.jsonl", corpus / "itself.jsonl")
    link("nowhere", corpus / "nothing.jsonl")
    os.mkfifo(corpus / "pipe.jsonl")
    assert files(corpus) == (
        ["x/a.jsonl"],
        {
            "itself.jsonl": "a link to nothing",
            "nothing.jsonl": "a link to nothing",
            "pipe.jsonl": "neither a file nor a folder",
            "x/parent/": "a link: it leads to the folder itself, which is read",
            "x/up/": "a link: it leads to the folder itself, which is read",
        },
    )


def test_a_folder_above_that_a_link_leads_to_is_read_but_for_the_corpus_itself(tmp_path: Path) -> None:
    put(tmp_path, "corpus/a.jsonl", "beside.jsonl")
    link("..", tmp_path / "corpus/up")
    found, left_out = files(tmp_path / "corpus")
    assert found == ["a.jsonl", "up/beside.jsonl"]
    assert left_out == {"up/corpus/": "a link: it leads to the folder itself, which is read"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.jsonl", "closed/b.jsonl")
    scandir = os.scandir

    def refusing(path: str):  # root may list everything
        if path.rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert files(tmp_path) == (["a.jsonl"], {"closed/": "it cannot be listed: Permission denied"})
    with pytest.raises(CorpusError, match="closed cannot be listed: Permission denied"):
        files(tmp_path / "closed")


def test_a_glob_follows_links_and_names_folders_that_it_passes_over(tmp_path: Path) -> None:
    put(tmp_path, "data/a.jsonl", "data/_b.jsonl", "data/part/c.jsonl", "elsewhere/d.jsonl", "data/other.txt")
    link(tmp_path / "elsewhere", tmp_path / "data/link")
    link(".", tmp_path / "data/loop")
    hidden = {"_b.jsonl": "hidden: its name begins with . or _"}
    assert files(f"{tmp_path}/data/*.jsonl") == (["a.jsonl"], hidden)
    found, left_out = files(f"{tmp_path}/data/*")
    assert found == ["a.jsonl", "other.txt"]
    assert list(left_out) == ["_b.jsonl", "link/", "loop/", "part/"]
    assert "/**" in left_out["part/"]
    found, left_out = files(f"{tmp_path}/data/**/*.jsonl")
    assert (found, left_out) == (["a.jsonl", "link/d.jsonl", "part/c.jsonl"], hidden)
    assert files(f"{tmp_path}/data/*/d.jsonl") == (["link/d.jsonl"], {})


@pytest.mark.parametrize("name", ["with [brackets]", "what?", "a*b", "a#b", "a::b", "100%", "a b"])
def test_a_path_that_exists_is_no_glob_and_no_url(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/x[1]?.jsonl")
    folder = tmp_path / name
    for path in (folder, folder / "x[1]?.jsonl"):
        root = Root(str(path))
        assert root.files() == (["x[1]?.jsonl"], {})
        assert root.describe("x[1]?.jsonl")[0] == len(ROW)


SPELLINGS = ["*.jsonl", "./*.jsonl", ".//*.jsonl", "../{name}/*.jsonl", ".././{name}//*.jsonl", "{base}/*.jsonl"]
SPELLINGS += [
    "{base}//./*.jsonl",
    "../link/../{name}/*.jsonl",
    "file://{base}//*.jsonl",
    "{base}/**",
    "../*/x[[]1].jsonl",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["exp [v2]", "what?", "a*b", "**", "a::b", "plain"])
def test_only_what_follows_the_folders_that_exist_is_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spelling: str
) -> None:
    if name == "a::b" and spelling.startswith("file:"):
        pytest.skip("in a URL, :: joins two")
    # Each of the others would match the name as a pattern.
    put(tmp_path, f"{name}/x[1].jsonl", f"{name}/notes.md", "exp v/other.jsonl", "what1/other.jsonl", "ab/other.jsonl")
    link(tmp_path / name, tmp_path / "link")
    monkeypatch.chdir(tmp_path / name)
    root = Root(spelling.format(name=name, base=tmp_path / name))
    file = f"{name}/x[1].jsonl" if "/*/" in spelling else "x[1].jsonl"
    found, left_out = root.files()
    assert found == [file]
    assert left_out == ({"notes.md": "unknown ending"} if "**" in spelling else {})
    assert root.describe(file)[0] == len(ROW)
    assert root.name == (tmp_path.name if "/*/" in spelling else name)


def test_what_does_not_exist_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "exp [v2]/a.jsonl")
    monkeypatch.chdir(tmp_path / "exp [v2]")
    for path in ("missing", "missing/*.jsonl", f"{tmp_path}/exp [v2]/missing", f"{tmp_path}/a::b/*.jsonl"):
        with pytest.raises(CorpusError, match="does not exist"):
            files(path)
    for path in ("*.txt", f"{tmp_path}/*/a.jsonl/*"):
        with pytest.raises(CorpusError, match="holds no file to read"):
            files(path)
    with pytest.raises(CorpusError, match="entire path component"):
        files("a**.jsonl")


@pytest.mark.parametrize("url", ["memory://q [1]/*.jsonl", "memory://q [1]"])
def test_a_glob_of_a_remote_folder_is_matched_below_it(url: str) -> None:
    fs = fsspec.filesystem("memory")
    try:
        for name in ("/q [1]/a.jsonl", "/q 1/other.jsonl", "/q [1]/_b.jsonl"):
            fs.pipe(name, ROW.encode())
        assert Root(url).files()[0] == ["a.jsonl"]
        assert Root("memory://q [1]/[a]*").files()[0] == ["a.jsonl"]
        assert Root("memory://q*/*.jsonl").files()[0] == ["q 1/other.jsonl", "q [1]/a.jsonl"]
    finally:
        fs.rm("/", recursive=True)


def test_an_empty_corpus_says_what_is_there_and_why_it_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, "a.md", "_b.jsonl")
    with pytest.raises(CorpusError, match=r"2 are left out: '_b.jsonl' \(hidden.*'a.md' \(unknown ending\)"):
        files(tmp_path)


def test_the_time_of_a_linked_file_is_that_of_its_target(tmp_path: Path) -> None:
    put(tmp_path, "target.jsonl")
    link(tmp_path / "target.jsonl", tmp_path / "corpus/a.jsonl")
    root = Root(str(tmp_path / "corpus"))
    before = root.stamps()["a.jsonl"]
    os.utime(tmp_path / "target.jsonl", (1, 1))
    assert root.stamps()["a.jsonl"] != before
