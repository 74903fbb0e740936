import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from sbp_assets.settings import PROFILES_DIR, Experiment, SettingsError, load_settings

SOURCE = "SBP_EXPERIMENT__CORPUS__SOURCE__PATH"
TINY = yaml.safe_load((PROFILES_DIR / "tiny.yaml").read_text())


def load(profile: str = "tiny", **environ: str):
    return load_settings(profile, environ)


@pytest.mark.parametrize("path", sorted(PROFILES_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_loads(path: Path):
    settings = (
        load(path.stem, SBP_EXPERIMENT__CORPUS__SOURCE__PATH="/corpus") if path.stem == "text" else load(path.stem)
    )
    assert settings.profile == path.stem
    assert settings.experiment.name == path.stem


def test_environment_overrides_single_values_and_feed_versions():
    plain, changed = load(), load(SBP_EXPERIMENT__PAIRING__NEIGHBORS="9")
    assert changed.experiment.pairing.neighbors == 9
    assert plain.experiment.version("1", "pairing") != changed.experiment.version("1", "pairing")
    assert plain.experiment.version("1", "corpus") == changed.experiment.version("1", "corpus")


def test_deployment_never_reaches_a_version():
    versions = [
        load(SBP_DEPLOYMENT__ENGINE_PROCESSES=processes).experiment.version("1", "synthesis", "model")
        for processes in ("1", "2")
    ]
    assert versions[0] == versions[1]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("SBP_EXPERIMENT__PAIRING__NIEGHBORS", "9", "experiment.pairing.nieghbors"),
        ("SBP_EXPERIMNT__PAIRING__NEIGHBORS", "9", "experimnt"),
        ("SBP_EXPERIMENT__CORPUS__SHARDS", "many", "experiment.corpus.shards"),
        ("SBP_EXPERIMENT__CORPUS__SPLIT__HELDOUT", "0", "without held-out documents"),
        ("SBP_EXPERIMENT__CORPUS__SPLIT__ORACLE", "0.9", "above 1"),
        ("SBP_EXPERIMENT__SYNTHESIZER__MAX_DOCUMENT_TOKENS", "200", "shorter than a pair"),
        ("SBP_EXPERIMENT__PRETRAINING__REPETITIONS", "0.5", "below one pass"),
        ("SBP_EXPERIMENT__PRETRAINING__SYNTHETIC_SHARE", "0.9", "less than one pass"),
        ("SBP_EXPERIMENT__PRETRAINING__TOKENS_PER_STEP", "700", "multiple of model.context_length"),
        ("SBP_EXPERIMENT__PAIRING__MIN_SIMILARITY", "1.0", "must be below"),
        ("SBP_EXPERIMENT__MODEL__KV_HEADS", "3", "multiple of kv_heads"),
        ("SBP_EXPERIMENT__CORPUS__SOURCE", "7", "experiment.corpus.source"),
        ("SBP_EXPERIMENT__NAME__X", "7", "is a value, not a section"),
        ("SBP_EXPERIMENT__NAME", "{", "not YAML"),
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
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TINY))
    settings = load(str(tmp_path / "mine.yaml"))
    assert settings.profile == "mine"
    assert settings.deployment.data_dir.endswith(".sbp/mine/artifacts")


def test_version_of_an_unknown_key_is_an_error():
    with pytest.raises(AttributeError):
        Experiment.model_validate(TINY["experiment"]).version("1", "pairing.nothing")


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


def test_a_judge_is_identity_and_where_it_answers_is_not_nor_holds_it_a_key():
    environ = {"SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL": "m", "SBP_DEPLOYMENT__JUDGE_URL": "http://127.0.0.1:1/v1"}
    versions = [
        load(**environ | changed).experiment.version("1", "synthesis.judge")
        for changed in (
            {},
            {"SBP_DEPLOYMENT__JUDGE_URL": "https://judge.example/v1", "SBP_DEPLOYMENT__JUDGE_CONCURRENCY": "2"},
            {"SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL": "other"},
        )
    ]
    assert versions[0] == versions[1] != versions[2]


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
        {"SBP_EXPERIMENT__CORPUS__SHARDS": "s3cret"},
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


def test_headline_is_the_demos_world_at_a_larger_budget():
    demo, headline = (load_settings(name, {}).experiment for name in ("demo", "headline"))
    own = ("seeds", "repetitions")
    pretraining = headline.pretraining.model_copy(update={key: getattr(demo.pretraining, key) for key in own})
    synthesizer = headline.synthesizer.model_copy(update={"epochs": demo.synthesizer.epochs})
    changed = {"name": demo.name, "pretraining": pretraining, "synthesizer": synthesizer}
    assert headline.model_copy(update=changed) == demo
    assert len(headline.seed_keys) >= 3 and headline.pretraining.repetitions > demo.pretraining.repetitions
