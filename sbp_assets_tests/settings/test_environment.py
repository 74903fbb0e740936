"""How environment variables are read as settings, and which variables are known."""

import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.settings import OTHER_VARIABLES, Settings, SettingsError, as_text, load_settings, variable
from sbp_assets.settings.environment import setting_types

CHECKOUT = Path(__file__).parents[2]
SOURCE = "SBP_EXPERIMENT__CORPUS__SOURCE"
FILES = '{"kind": "files", "path": "/data", "id_field": null}'


def value_of(key: str, profile: str = "tiny", **environ: str) -> Any:
    """The setting with the dotted `key` after a load under `environ`."""
    value: Any = load_settings(profile, environ)
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("text", ["007", "1.50", "true", "null", "", "~", "[0", "{a: b}", "'quoted'", "* * *", "ä b"])
def test_a_string_stays_what_was_typed(text: str):
    assert value_of("experiment.corpus.split.salt", SBP_EXPERIMENT__CORPUS__SPLIT__SALT=text) == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("experiment.corpus.shards", "8", 8),
        ("experiment.pairing.min_similarity", "5e-1", 0.5),
        ("experiment.pairing.both_directions", "false", False),
        ("deployment.automation", "true", True),
        ("deployment.device", "cpu", "cpu"),
        ("deployment.nightly", "*/30 * * * *", "*/30 * * * *"),
        ("deployment.nightly_until", "null", None),
        ("deployment.overdue_days", "null", None),
        ("deployment.owners", '["team:a", "team:b"]', ("team:a", "team:b")),
        ("experiment.pretraining.seeds", "[0, 1]", (0, 1)),
        ("experiment.corpus.max_chars", "null", None),
        ("experiment.corpus.max_chars", "12", 12),
        ("experiment.corpus.tokenizer.name", "007", "007"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_setting(key: str, text: str, value: object):
    assert value_of(key, **{variable(*key.split(".")): text}) == value


def test_null_is_refused_where_a_number_has_to_be():
    with pytest.raises(SettingsError, match=r"shards \(from SBP_EXPERIMENT__CORPUS__SHARDS\).*integer"):
        load_settings("tiny", {"SBP_EXPERIMENT__CORPUS__SHARDS": "null"})


def test_a_variable_reaches_into_the_profiles_kind_of_source():
    source = value_of("experiment.corpus.source", **{f"{SOURCE}__DOCUMENTS": "500"})
    assert (source.kind, source.documents, source.concepts) == ("concepts", 500, 12)


def test_a_source_given_whole_replaces_the_profiles_and_may_be_of_another_kind():
    source = value_of("experiment.corpus.source", **{SOURCE: FILES})
    assert source.model_dump(exclude_defaults=True) == {"path": "/data", "id_field": None}


@pytest.mark.parametrize("order", permutations([(SOURCE, FILES), (f"{SOURCE}__PATH", "/other")]))
def test_single_settings_apply_on_top_of_a_section_given_whole(order: list[tuple[str, str]]):
    assert value_of("experiment.corpus.source.path", **dict(order)) == "/other"


def test_a_section_that_the_profile_leaves_null_is_filled_by_its_settings():
    judge = {"SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL": "m", "SBP_DEPLOYMENT__JUDGE_URL": "http://127.0.0.1:1/v1"}
    assert value_of("experiment.synthesis.judge.model", **judge) == "m"
    judge["SBP_EXPERIMENT__SYNTHESIS__JUDGE"] = "null"
    del judge["SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL"]
    assert value_of("experiment.synthesis.judge", **judge) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SBP_PROFIL", "SBP_PROFILE"),
        ("SBP_POSTGRES", "SBP_POSTGRES_URL"),
        ("SBP_DEPLOYMENT__JUDGE_API_KEY", "SBP_JUDGE_API_KEY"),
        ("SBP_DEPLOYMENT__TAKE_IN_NEW_FILES", "SBP_DEPLOYMENT__INGEST_NEW_FILES"),
        ("SBP_EXPERIMENT__SHARDS", "SBP_EXPERIMENT__CORPUS__SHARDS"),
        ("SBP_EXPERIMENT__CORPUS__SOURCE__PTH", "SBP_EXPERIMENT__CORPUS__SOURCE__PATH"),
        ("SBP_EXPERIMNT__PAIRING__NEIGHBORS", "SBP_EXPERIMENT__PAIRING__NEIGHBORS"),
        ("SBP_EXPERIMENT_CORPUS_SHARDS", "SBP_EXPERIMENT__CORPUS__SHARDS"),
        ("SBP_EXPERIMENT__CORPUS_SHARDS", "SBP_EXPERIMENT__CORPUS__SHARDS"),
        ("sbp_experiment__corpus__shards", "SBP_EXPERIMENT__CORPUS__SHARDS"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(name: str, nearest: str):
    with pytest.raises(SettingsError, match=rf"{name}\)?: is unknown; the nearest name is {nearest}$"):
        load_settings("tiny", {name: "s3cret"})


def test_an_error_names_every_wrong_variable_and_key():
    wrong = {
        "SBP_PROFIL": "demo", "SBP_EXPERIMENT__PAIRING__NIEGHBORS": "9", "SBP_EXPERIMENT__PRETRAINING__SEEDS": "[",
        "SBP_EXPERIMENT__CORPUS__SHARDS": "many",
    }  # fmt: skip
    with pytest.raises(SettingsError) as refused:
        load_settings("tiny", wrong)
    assert all(name in str(refused.value) for name in wrong)


def test_an_error_in_a_section_given_whole_names_its_variable():
    with pytest.raises(SettingsError, match=rf"source\.path \(from {SOURCE}\): Field required"):
        load_settings("tiny", {SOURCE: '{"kind": "files"}'})
    with pytest.raises(SettingsError, match=r"seeds\.1 \(from SBP_EXPERIMENT__PRETRAINING__SEEDS\)"):
        load_settings("tiny", {"SBP_EXPERIMENT__PRETRAINING__SEEDS": "[0, -1]"})


def test_json_with_a_key_twice_or_nested_beyond_reason_is_refused():
    with pytest.raises(SettingsError, match=rf"source \(from {SOURCE}\): not JSON.*the key path is there twice"):
        load_settings("tiny", {SOURCE: '{"kind": "files", "path": "/a", "path": "/b"}'})
    with pytest.raises(SettingsError, match="nested too deeply"):
        load_settings("tiny", {"SBP_EXPERIMENT__PRETRAINING__SEEDS": "[" * 100_000})


def test_other_variables_of_the_project_and_those_of_others_are_no_settings():
    environ = {**dict.fromkeys(OTHER_VARIABLES, "x"), "SBP_PROFILE": "tiny", "SBPX": "x", "PATH": "x"}
    assert load_settings(environ=environ) == load_settings("tiny", {})


def test_every_variable_that_the_project_names_is_known():
    known = {*OTHER_VARIABLES, *(variable(*path) for path in setting_types(Settings))}
    places = ["sbp_assets", "benchmarks", "deploy", "docs", ".ci", "Makefile", "README.md", "dagster.yaml"]
    files = [path for place in places for path in (CHECKOUT / place, *(CHECKOUT / place).rglob("*")) if path.is_file()]
    texts = [path for path in files if path.suffix not in (".png", ".pyc")]
    named = {(path.name, name) for path in texts for name in re.findall(r"\bSBP_[A-Z0-9_]+", path.read_text())}
    # A name that is put together, as f"SBP_DEPLOYMENT__{key}", is the beginning of known ones.
    unknown = {(path, name) for path, name in named if not any(other.startswith(name) for other in known)}
    assert len(texts) > 100 and unknown == set()


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_a_text_is_read_back_as_it_was_written(text: str):
    assert value_of("experiment.synthesis.salt", SBP_EXPERIMENT__SYNTHESIS__SALT=as_text(text)) == text


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_a_list_is_read_back_as_it_was_written(seeds: list[int]):
    assert value_of("experiment.pretraining.seeds", SBP_EXPERIMENT__PRETRAINING__SEEDS=as_text(seeds)) == tuple(seeds)
