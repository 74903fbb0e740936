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


@pytest.mark.parametrize(
    ("value", "directory"), [("/x/{profile}/a", "/x/tiny/a"), ("/x/a{b}", "/x/a{b}"), ("/x/{", "/x/{")]
)
def test_only_the_profiles_name_is_filled_into_a_directory(value: str, directory: str):
    assert load(SBP_DEPLOYMENT__DATA_DIR=value).deployment.data_dir == directory
    assert load(SBP_DEPLOYMENT__TENSORBOARD_DIR=value).deployment.tensorboard_dir == directory


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
        "/data/a:b@c/d?.jsonl",
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
