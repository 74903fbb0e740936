"""Loading of profiles: what is refused, and what an error says and keeps to itself."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from sbp_assets.settings import PROFILES_DIR, Settings, SettingsError, load_settings

SOURCE = "SBP_EXPERIMENT__CORPUS__SOURCE__PATH"


def load(profile: str = "tiny", **environ: str) -> Settings:
    return load_settings(profile, environ)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SBP_EXPERIMENT__PAIRING__NIEGHBORS", "9", "experiment.pairing.nieghbors"),
        ("SBP_EXPERIMNT__PAIRING__NEIGHBORS", "9", "experimnt"),
        ("SBP_EXPERIMENT__CORPUS__SHARDS", "many", "experiment.corpus.shards"),
        ("SBP_EXPERIMENT__CORPUS__SPLIT__HELDOUT", "0", "without held-out documents"),
        ("SBP_EXPERIMENT__CORPUS__SPLIT__ORACLE", "0.9", "above 1"),
        ("SBP_EXPERIMENT__SYNTHESIZER__MAX_DOCUMENT_TOKENS", "200", "shorter than a pair"),
        ("SBP_EXPERIMENT__PRETRAINING__REPETITIONS", "0.5", "below one epoch"),
        ("SBP_EXPERIMENT__PRETRAINING__SYNTHETIC_SHARE", "0.9", "less than one epoch"),
        ("SBP_EXPERIMENT__PRETRAINING__TOKENS_PER_STEP", "700", "multiple of model.context_length"),
        ("SBP_EXPERIMENT__PAIRING__MIN_SIMILARITY", "1.0", "must be below"),
        ("SBP_EXPERIMENT__MODEL__KV_HEADS", "3", "multiple of kv_heads"),
        ("SBP_EXPERIMENT__CORPUS__SOURCE", "7", "experiment.corpus.source"),
        ("SBP_EXPERIMENT__NAME__X", "7", r"experiment\.name\.x .*nearest name is SBP_EXPERIMENT__NAME$"),
        ("SBP_EXPERIMENT__PRETRAINING__SEEDS", "[", r"seeds \(from SBP_EXPERIMENT__PRETRAINING__SEEDS\): not JSON"),
        ("SBP_EXPERIMENT__NAME", "{", r"experiment\.name \(from SBP_EXPERIMENT__NAME\): String should match"),
        ("SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL", "some-model", "deployment.judge_url is not"),
        (
            "SBP_EXPERIMENT__CORPUS__SOURCE__KIND",
            "x",
            r"source\.kind \(from SBP_.*__KIND\): is none of",
        ),
        ("SBP_EXPERIMENT__SYNTHESIS__JUDGE__PROMPTS", "v99", r"PROMPTS\): is no revision of the prompts.* are: v1"),
    ],
)
def test_impossible_settings_are_refused_with_key_and_reason(variable: str, value: str, says: str):
    with pytest.raises(SettingsError, match=says):
        load(**{variable: value})


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(SettingsError, match="demo"):
        load("nonsense")


def test_a_profile_of_ones_own_is_a_path(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text((PROFILES_DIR / "tiny.yaml").read_text())
    settings = load(str(tmp_path / "mine.yaml"))
    assert settings.profile == "mine"
    assert settings.deployment.data_dir.endswith(".sbp/mine/artifacts")
    (tmp_path / "a\u3000b.yaml").write_text((PROFILES_DIR / "tiny.yaml").read_text())
    assert load(str(tmp_path / "a\u3000b.yaml")).profile == "a\u3000b"


@pytest.mark.parametrize(
    ("value", "directory"),
    [
        ("/x/{profile}/a", "/x/tiny/a"), ("/x/{", "/x/{"), ("/x/a{1,2}", "/x/a{1,2}"),
        ("/x/[v2] 'a' #%*", "/x/[v2] 'a' #%*"),
        ("~/a", f"{os.path.expanduser('~')}/a"), ("/x/~", "/x/~"), ("//x/./y//z/", "/x/y/z"), ("/x/../y", "/y"),
        *((name, name) for name in ("/x/a\u3000b", "/x/a\u00a0b", "/x/می\u200cخواهم", "/x/👨\u200d👩\u200d👧")),
        ("a::b", f"{os.getcwd()}/a::b"), ("/x/s3://y", "/x/s3:/y"),
    ],
)  # fmt: skip
def test_a_directory_is_the_path_that_was_written(value: str, directory: str):
    assert load(SBP_DEPLOYMENT__DATA_DIR=value).deployment.data_dir == directory
    assert load(SBP_DEPLOYMENT__TENSORBOARD_DIR=value).deployment.tensorboard_dir == directory


def test_a_name_in_braces_is_the_profiles_or_a_folder_that_is_there(tmp_path: Path):
    with pytest.raises(
        SettingsError, match=r"data_dir \(from SBP_DEPLOYMENT__DATA_DIR\).*\{profile\} alone is filled in"
    ):
        load(SBP_DEPLOYMENT__DATA_DIR=f"{tmp_path}/a{{run}}/store")
    (tmp_path / "a{run}").mkdir()
    assert (
        load(SBP_DEPLOYMENT__DATA_DIR=f"{tmp_path}/a{{run}}/store").deployment.data_dir == f"{tmp_path}/a{{run}}/store"
    )


@pytest.mark.parametrize("key", ["data_dir", "work_dir", "instance_dir", "tensorboard_dir", "benchmarks_dir"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("caf\udce9", "not UTF-8|unicode string"),
        ("a\nb", "line break"),
        ("a\u2028b", "line break"),
        ("a\x1bb", "control"),
        ("a\0b", "null character"),
        ("", "at least 1"),
    ],
)
def test_a_directory_that_cannot_be_opened_everywhere_is_refused(key: str, name: str, says: str):
    with pytest.raises(SettingsError, match=rf"deployment\.{key} \(from .*({says})"):
        load(**{f"SBP_DEPLOYMENT__{key.upper()}": name})


def test_a_working_directory_that_is_not_utf8_is_refused_where_a_directory_is_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder := tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(SettingsError, match=r"deployment\.work_dir .*path that is not UTF-8.*rename that folder"):
        load()
    elsewhere = {f"SBP_DEPLOYMENT__{name.upper()}": f"/x/{name}" for name in ("data_dir", "work_dir", "instance_dir")}
    assert load(**elsewhere).deployment.work_dir == "/x/work_dir"


def test_a_question_mark_ends_the_url_of_an_sqlite_database():
    with pytest.raises(SettingsError, match=r"deployment\.instance_dir .*'\?'.*SQLite"):
        load(SBP_DEPLOYMENT__INSTANCE_DIR="/x/exp?1")
    assert (
        load(SBP_DEPLOYMENT__DATA_DIR="/x/exp?1", SBP_DEPLOYMENT__WORK_DIR="/x/exp?1").deployment.data_dir == "/x/exp?1"
    )
    postgres = {"SBP_DEPLOYMENT__INSTANCE_DIR": "/x/exp?1", "SBP_POSTGRES_URL": "postgresql://host/db"}
    assert load(**postgres).deployment.instance_dir == "/x/exp?1"


def test_a_url_is_of_a_protocol_that_there_is_and_a_local_folder_is_none():
    with pytest.raises(SettingsError, match=r"deployment\.data_dir .*protocol that fsspec does not know.* s3,"):
        load(SBP_DEPLOYMENT__DATA_DIR="s4://bucket/x")
    with pytest.raises(SettingsError, match="protocol that fsspec does not know"):
        load("text", **{SOURCE: "zipp::s3://bucket/a.zip"})
    with pytest.raises(SettingsError, match=r"deployment\.work_dir .*is a URL: this has to be a folder"):
        load(SBP_DEPLOYMENT__WORK_DIR="s3://bucket/x")


def test_a_deleted_working_directory_is_an_error_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SettingsError, match="working directory"):
        load()


@pytest.mark.parametrize("content", [b"# caf\xc3\xa9\nnote: \xc3\xa9\n", b"\xef\xbb\xbfnote: \xc3\xa9\n"])
def test_a_profile_is_utf8_whatever_the_locale(tmp_path: Path, content: bytes):
    (tmp_path / "mine.yaml").write_bytes(content + (PROFILES_DIR / "tiny.yaml").read_bytes().replace(b"note:", b"#"))
    code = "from sbp_assets.settings import load_settings; print(ascii(load_settings('mine.yaml', {}).note))"
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "'\\xe9'\n", done.stderr


def test_a_variable_is_utf8_whatever_the_locale(tmp_path: Path):
    names = ["SBP_EXPERIMENT__CORPUS__SPLIT__SALT", "SBP_DEPLOYMENT__WORK_DIR", SOURCE]
    code = """if True:
        import sys
        from sbp_assets.settings import SettingsError, load_settings
        try:
            print(ascii(load_settings('text').experiment.corpus.split.salt))
        except SettingsError as error:
            print(ascii(str(error)))"""
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", SOURCE: "corpus"}
    said = []
    for name, value in [(names[0], b"\xc3\xa9"), (names[0], b"\xe9"), (names[1], b"\xc3\xa9"), (names[2], b"\xc3\xa9")]:
        changed = {**{name.encode(): text.encode() for name, text in environ.items()}, name.encode(): value}
        done = subprocess.run([sys.executable, "-c", code], env=changed, cwd=tmp_path, capture_output=True, text=True)
        said.append(done.stdout)
    assert said[0] == "'\\xe9'\n" and "salt (from SBP_EXPERIMENT__CORPUS__SPLIT__SALT): is not UTF-8" in said[1]
    assert all(
        f"(from {name})" in line and "set PYTHONUTF8=1" in line for name, line in zip(names[1:], said[2:], strict=True)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"# \xe9\nexperiment: {}\n", r"is not UTF-8 \(byte 3\)"),
        (b"experiment:\n  name: a\n  name: b\n", r"the key name is there twice \(line 3, column 3\)"),
        (b"deployment: {device: cpu, device: cuda}\n", "the key device is there twice"),
        (b"experiment: {nam: a}\n", r"experiment\.nam .*is unknown; the nearest name is name"),
        (b"experimnt: {}\n", r"experimnt: is unknown; the nearest name is experiment"),
        (b"note: \x07\n", "character 7 is one that YAML does not allow"),
        (b"profile: 9" + b"9" * 5000, r"there is no int that can be read \(line 1, column 10\)"),
        (b"note: !!bool s3cret\n", r"not YAML: there is no bool that can be read \(line 1, column 7\)"),
        (b"note: [1,\n !!int s3cret]\n", r"there is no int that can be read \(line 2, column 2\)"),
        (b"note: !!float s3cret\n", "there is no float that can be read"),
        (b"note: !!timestamp 2026-99-99\n", "there is no timestamp that can be read"),
        (b"note: !!timestamp s3cret\n", "there is no timestamp that can be read"),
        (b"note: " + b"[" * 5000, "nested too deeply"),
        (b"- a\n", "expected a mapping"),
        (b"note: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"profile: a/b\n", "profile: has to be a name"),
    ],
)
def test_a_profile_that_cannot_be_read_is_a_line(tmp_path: Path, text: bytes, says: str):
    (tmp_path / "mine.yaml").write_bytes(text)
    with pytest.raises(SettingsError, match=says) as refused:
        load(str(tmp_path / "mine.yaml"))
    assert "s3cret" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("'8'", 8),
        ("1_000", 1000),
        ("1:30", None),
        ("0x10", None),
        ("0o17", None),
        ("true", None),
        ("yes", None),
        ("1e3", 1000),
    ],
)
def test_a_number_of_a_profile_is_what_was_written(tmp_path: Path, text: str, value: int | None):
    tiny = (PROFILES_DIR / "tiny.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(tiny.replace("shards: 2", f"shards: {text}"))
    if value is None:
        with pytest.raises(SettingsError, match=r"experiment\.corpus\.shards"):
            load(str(tmp_path / "mine.yaml"))
    else:
        assert load(str(tmp_path / "mine.yaml")).experiment.corpus.shards == value


def test_a_key_that_a_merge_brings_may_be_overridden(tmp_path: Path):
    merged = "x: &x {device: cuda, compile: true}\ndeployment: {<<: *x, device: cpu}\n"
    (tmp_path / "mine.yaml").write_text(merged + (PROFILES_DIR / "tiny.yaml").read_text())
    with pytest.raises(SettingsError, match=r"^profile .*\n  x: is unknown[^\n]*$"):
        load(str(tmp_path / "mine.yaml"))


def test_no_tracker_is_chosen_by_itself():
    deployment = load().deployment
    assert deployment.tensorboard_dir is None and deployment.wandb_project is None


def test_cli_prints_the_reason_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "sbp_assets.cli", "plan"],
        env={**os.environ, "SBP_EXPERIMENT__CORPUS__SHARDS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "experiment.corpus.shards" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_names_the_variable_that_set_the_key_and_one_that_could():
    with pytest.raises(SettingsError, match=r"similarty \(from SBP_EXPERIMENT__PAIRING__MIN_SIMILARTY\)"):
        load(SBP_EXPERIMENT__PAIRING__MIN_SIMILARTY="0.6")
    with pytest.raises(
        SettingsError, match=r"source\.path \(environment variable SBP_EXPERIMENT__CORPUS__SOURCE__PATH\)"
    ):
        load("text")


@pytest.mark.parametrize("variable", ["SBP_DEPLOYMENT__JUDGE_URL", "SBP_DEPLOYMENT__DATA_DIR", SOURCE])
@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@host/v1", "https://s3cret@host/v1", "http://host/v1?api_key=s3cret",
        "https://host:8080/a.jsonl?X-Amz-Signature=s3cret", "https://user:s3cret@host:80/v1",
    ],
)  # fmt: skip
def test_credentials_in_a_url_are_refused_and_not_repeated(variable: str, url: str):
    with pytest.raises(SettingsError, match=rf"{variable}\): .*credentials are given .* in the environment") as refused:
        load("text", **{SOURCE: "/corpus", variable: url})
    assert "s3cret" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "path", ["s3://key:s3cret@bucket/x", "ftp://u:s3cret@h", "zip://*.jsonl::https://u:s3cret@h/a.zip"]
)
def test_credentials_of_a_file_system_are_refused_in_its_url(path: str):
    with pytest.raises(SettingsError, match="credentials") as refused:
        load("text", **{SOURCE: path})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "path",
    [
        "s3://bucket/part-?.jsonl", "hf://datasets/a/b@main/x.parquet", "zip://*.jsonl::hf://datasets/a/b@main/x.zip",
        "http://localhost:8080/a@b.jsonl", "abfs://container@account.dfs.core.windows.net/x", "sftp://user@host:22/x@y",
        "/data/a:b@c/d?.jsonl", "zip://*.jsonl::/data/a.zip", "zip://*.jsonl::~/a.zip", "zip://*.jsonl::../a.zip",
        "zip://a.jsonl::a1.zip", "simplecache::zip://*.jsonl::file:///data/a.zip",
    ],
)  # fmt: skip
def test_urls_that_hold_no_credentials_are_taken(path: str):
    assert load("text", **{SOURCE: path}).experiment.corpus.source.path == path


@pytest.mark.parametrize(
    "environ",
    [
        {"SBP_EXPERIMENT__NAME": "{ s3cret: ["}, {"SBP_DEPLOYMENT__JUDGE_API_KEY": "s3cret"},
        {"SBP_EXPERIMENT__CORPUS__SHARDS": "s3cret"}, {"SBP_EXPERIMENT__PRETRAINING__SEEDS": "[s3cret"},
        {"SBP_EXPERIMENT__CORPUS__SOURCE": '{"kind": "s3cret"}'}, {"SBP_JUDGE_API_KY": "s3cret"},
    ],
)  # fmt: skip
def test_an_error_repeats_no_value_in_its_message_or_its_causes(environ: dict[str, str]):
    with pytest.raises(SettingsError) as refused:
        load("tiny", **environ)
    assert next(iter(environ)) in str(refused.value)
    assert "s3cret" not in "".join(traceback.format_exception(refused.value))


def test_an_unreadable_profile_is_not_quoted(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("deployment:\n  key: [s3cret\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml: not YAML: .*line 3, column 1") as refused:
        load(str(tmp_path / "mine.yaml"))
    assert "s3cret" not in "".join(traceback.format_exception(refused.value))
