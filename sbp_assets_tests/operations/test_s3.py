"""The pipeline with its artifacts behind a real S3 server, and what happens to them when something dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from upath import UPath

from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.remote import RemoteStore, StorageError, root
from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.servers import S3Server

DATA_DIR, WORK_DIR = "SBP_DEPLOYMENT__DATA_DIR", "SBP_DEPLOYMENT__WORK_DIR"


def versions(store: Path) -> dict[str, str]:
    """Content version per artifact in the folder of a bucket, by its path in a local store."""
    found = {}
    for path in store.rglob("*"):
        name = path.relative_to(store).as_posix()
        if "." in name.rpartition("/")[0] or not path.is_file():
            continue  # a file of a directory, which its listing stands for
        if path.suffix == ".json":
            found[name.removesuffix(".json")] = content_version(path.parent / json.loads(path.read_text())["prefix"])
        else:
            found[name] = content_version(path)
    return {name: version for name, version in found.items() if not name.startswith("evaluation/report")}


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> Path:
    return s3.bucket("artifacts")


@pytest.fixture(scope="module")
def remote(s3: S3Server, bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment whose `sbp run` has finished on S3; what it said is in said.log."""
    home = tmp_path_factory.mktemp("remote")
    with Deployment(home, {**s3.environ, DATA_DIR: "s3://artifacts/tiny"}) as deployment:
        done = deployment.sbp("run", seconds=3600)
        (home / "said.log").write_text(done.stdout + done.stderr)
        yield deployment


@pytest.mark.faults
def test_a_run_on_s3_materialises_the_same_bytes_as_a_local_one(
    remote: Deployment, bucket: Path, s3: S3Server, finished: Path, tmp_path: Path
):
    with Deployment(tmp_path, finished=finished) as local:
        assert versions(bucket / "tiny") == local.versions()
    assert not list(remote.artifacts.iterdir())
    said = (remote.home / "said.log").read_text()
    assert "share of oracle's gain" in said
    assert "report: s3://artifacts/tiny/evaluation/report." in said
    assert S3Server.SECRET_KEY not in said
    # Nothing that was replaced or half-written is left over: every prefix is one that a list of files names.
    files = [path.relative_to(bucket / "tiny").as_posix() for path in bucket.rglob("*") if path.is_file()]
    listings = {name for name in files if name.endswith(".json") and "." not in name.removesuffix(".json")}
    prefixes = {name[: name.index("/", name.index("."))] for name in files if "." in name.rpartition("/")[0]}
    named = {name: json.loads((bucket / "tiny" / name).read_text())["prefix"] for name in listings}
    assert prefixes == {f"{name.rpartition('/')[0]}/{prefix}" for name, prefix in named.items()}


@pytest.mark.faults
def test_another_machine_finds_everything_fresh_and_continues(remote: Deployment, bucket: Path, tmp_path: Path):
    """Another machine: nothing local but the instance."""
    remote.overrides[WORK_DIR] = str(tmp_path / "work")
    before = {path: path.stat().st_mtime_ns for path in bucket.rglob("*")}
    again = remote.sbp("run")
    assert "nothing to do: everything is up to date" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in bucket.rglob("*")} == before
    (document, *_) = pl.read_parquet(bucket / "tiny/synthesis/synthetic_documents/00000.parquet")["id"]
    for name in (document, "heldout/perplexity/sbp/0", "pretraining/sbp_model/0"):
        traced = json.loads(remote.sbp("trace", name, "--json").stdout)["traces"]
        assert len(traced) == 1 and not traced[0].get("missing")
    versions_before = versions(bucket / "tiny")
    remote.overrides["SBP_EXPERIMENT__PAIRING__MAX_PAIRS_PER_DOCUMENT"] = "1"
    assert "[   done] Choose pairs" in remote.sbp("run", "--until", "pair").stderr
    changed = {name for name, version in versions(bucket / "tiny").items() if versions_before[name] != version}
    capped = ("neighbor_edges/00000", "neighbor_pairs/00000.parquet", "neighbor_pairs/00001.parquet")
    assert changed == {f"pairing/{name}" for name in capped}


def test_artifacts_are_copied_from_a_local_store(s3: S3Server, finished: Path, tmp_path: Path):
    bucket = s3.bucket("moved")
    with Deployment(tmp_path, s3.environ, finished) as deployment:
        versions_before = deployment.versions()
        lost = deployment.artifacts / "pairing/pair_truth.parquet"
        content = lost.read_bytes()
        lost.write_bytes(content[:-1])
        first = deployment.sbp("copy-artifacts", "s3://moved/tiny", check=False)
        assert first.returncode == 1 and "not what was made: pairing/pair_truth" in first.stdout
        lost.write_bytes(content)
        again = deployment.sbp("copy-artifacts", "s3://moved/tiny")
        assert "copied 1 artifacts to s3://moved/tiny, " in again.stdout
        assert versions(bucket / "tiny") == versions_before
        deployment.overrides[DATA_DIR] = "s3://moved/tiny"
        shutil.rmtree(deployment.artifacts)
        assert "nothing to do" in deployment.sbp("run").stdout
        # A file of a directory is lost: verify finds it, and the next run re-materialises the directory.
        (file,) = bucket.glob("tiny/corpus/tokens/00000.*/tokens.npy")
        s3.remove(f"moved/{file.relative_to(bucket)}")
        verified = deployment.sbp("verify", "tokenise", check=False)
        assert verified.returncode == 1 and "2 partitions checked, 1 corrupted" in verified.stdout
        assert "[   done] Tokenise" in deployment.sbp("run", "--until", "tokenise").stderr
        assert "nothing to do" in deployment.sbp("run").stdout
        assert versions(bucket / "tiny") == versions_before
        unknown = deployment.sbp("copy-artifacts", "s3://mistyped/tiny", check=False)
        assert unknown.returncode == 1 and "bucket does not exist" in " ".join(unknown.stderr.split())
        assert "Traceback" not in unknown.stderr


def test_the_corpus_itself_may_be_on_s3(s3: S3Server, tmp_path: Path):
    corpus = s3.bucket("corpus") / "news"
    corpus.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"id": f"{name}{n}", "text": f"Document {n} of file {name}."}) for n in range(3)]
        (corpus / f"{name}.jsonl").write_text("\n".join(lines))
    source = json.dumps({"kind": "files", "path": "s3://corpus/news"})
    overrides = {**s3.environ, "SBP_EXPERIMENT__CORPUS__SOURCE": source, "SBP_EXPERIMENT__CORPUS__SHARDS": "2"}
    with Deployment(tmp_path, overrides) as deployment:
        deployment.sbp("run", "--until", "ingest")
        documents = pl.read_parquet(deployment.artifacts / "corpus/raw_documents/*.parquet")
        assert sorted(documents["id"]) == ["a0", "a1", "a2", "b0", "b1", "b2"]
        manifest = pl.read_parquet(deployment.artifacts / "corpus/source_manifest.parquet")
        assert manifest["file"].to_list() == ["a.jsonl", "b.jsonl"] and manifest["modified"].null_count() == 0


def test_a_missing_bucket_is_a_one_line_error_and_is_not_created(s3: S3Server, tmp_path: Path):
    with Deployment(tmp_path, {**s3.environ, DATA_DIR: "s3://mistyped/tiny"}) as deployment:
        done = deployment.sbp("run", "--until", "manifest", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = (
        "s3://mistyped/tiny/corpus/source_manifest.parquet: The specified bucket does not exist. Create the bucket"
    )
    assert message in " ".join(done.stderr.split())
    assert S3Server.SECRET_KEY not in done.stdout + done.stderr
    assert not (s3.folder / "buckets/mistyped").exists()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "planted-wrong-key"}, "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Tried for 1 s (deployment.storage_patience)"),
    ],
    ids=["wrong key", "no key", "nobody there"],
)
def test_the_error_of_an_unusable_store_says_what_to_do(
    environ: dict[str, str | None], says: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {**s3.environ, **environ}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    path = UPath("s3://elsewhere/store/table.parquet", skip_instance_cache=True)
    (tmp_path / "table").write_text("x")
    with pytest.raises(StorageError, match=r"s3://elsewhere/store/table\.parquet: ") as raised:
        RemoteStore(path.parent, tmp_path, 1e9, patience=1).put_file(tmp_path / "table", path.path)
    assert says in str(raised.value)
    for secret in (S3Server.SECRET_KEY, "planted-wrong-key"):
        assert secret not in str(raised.value)


WRITER = """
import sys
from pathlib import Path
from sbp_assets.storage.remote import RemoteStore, root
url, cache, local = sys.argv[1:]
path = root(url)
RemoteStore(path.parent, Path(cache), 1e9, 60).put_directory(Path(local), path.path, "v")
"""


def model(folder: Path, content: bytes) -> Path:
    """Directory of two small files and one that goes up in several parts."""
    folder.mkdir(parents=True)
    for name, size in (("config.json", 1), ("tokenizer.json", 1), ("model.safetensors", 60_000_000)):
        (folder / name).write_bytes(content * size)
    return folder


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes()[:1] for path in folder.iterdir()} | {(folder / "model.safetensors").read_bytes()[-1:]}


def test_a_writer_killed_in_the_upload_changes_nothing_and_readers_never_see_a_mixture(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    folder = s3.bucket("models")
    path = root("s3://models/store/model")
    store = RemoteStore(path.parent, tmp_path / "cache", 1e9, patience=60)
    store.put_directory(model(tmp_path / "old", b"o"), path.path, "v")
    new = model(tmp_path / "new", b"n")
    command = [sys.executable, "-c", WRITER, str(path), str(tmp_path / "other"), str(new)]
    killed = subprocess.Popen(command, env={**os.environ, **s3.environ})
    wait_for(lambda: len(list(folder.glob("store/model.v-*"))) == 2, "the upload to begin", every=0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert contents(store.get(path.path, directory=True)) == {b"o"}
    # Read again and again while it is replaced: all of the old or all of the new.
    writing = subprocess.Popen(command, env={**os.environ, **s3.environ})
    seen = []
    while writing.poll() is None:
        reader = RemoteStore(path.parent, tmp_path / f"reader{len(seen)}", 1e9, patience=60)
        seen.append(contents(reader.get(path.path, directory=True)))
    assert writing.returncode == 0
    seen.append(contents(store.get(path.path, directory=True)))
    assert seen[0] == {b"o"} and seen[-1] == {b"n"}
    assert all(found in ({b"o"}, {b"n"}) for found in seen)


def test_an_upload_outlasts_a_server_that_restarts(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    s3.bucket("restarts")
    path = root("s3://restarts/model")
    store = RemoteStore(path.parent, tmp_path / "cache", 1e9, patience=120)
    s3.kill()
    timer = threading.Timer(3, s3.start)
    timer.start()
    began = time.monotonic()
    store.put_directory(model(tmp_path / "model", b"m"), path.path, "v")
    timer.join()
    assert time.monotonic() - began > 3
    assert contents(store.get(path.path, directory=True)) == {b"m"}
    s3.kill()
    store._patience = 1
    with pytest.raises(StorageError, match=r"cannot read s3://restarts/model.json.*Tried for 1 s"):
        store.get(path.path, directory=True)
    s3.start()
