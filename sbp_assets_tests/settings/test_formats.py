"""Every number has bounds, texts of a certain form are checked at load, and no value whatever ends in a stack trace."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from dagster._core.definitions.utils import is_valid_owner
from dagster._utils.schedules import is_valid_cron_schedule, schedule_execution_time_iterator
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sbp_assets.settings import PROFILES_DIR, Settings, SettingsError, load_settings, variable
from sbp_assets.settings.environment import setting_types

TINY = yaml.safe_load((PROFILES_DIR / "tiny.yaml").read_text())
PATHS = sorted(path for path in setting_types(Settings) if path[0] in ("experiment", "deployment"))


def numbers(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the constraints of every number of `section` and the sections in it."""

    def leaves(annotation: Any, metadata: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
        if get_origin(annotation) is Annotated:
            inner, *more = get_args(annotation)
            flat = [x for m in more for x in (m.metadata if isinstance(m, FieldInfo) else [m])]
            yield from leaves(inner, metadata + flat)
        elif get_origin(annotation) in (Union, types.UnionType, tuple):
            for one in get_args(annotation):
                yield from leaves(one, metadata)
        else:
            yield annotation, metadata

    for key, field in section.model_fields.items():
        for kind, constraints in leaves(field.annotation, list(field.metadata)):
            if kind in (int, float):
                yield ".".join((*path, key)), constraints
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, (*path, key))


def test_every_number_has_a_lower_and_an_upper_bound():
    found = list(numbers(Settings))
    assert len(found) > 80
    for name, constraints in found:
        assert any(isinstance(c, (annotated_types.Ge, annotated_types.Gt)) for c in constraints), name
        assert any(isinstance(c, (annotated_types.Le, annotated_types.Lt)) for c in constraints), name


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Profile tiny as a mapping, with `value` at `path`."""
    values = yaml.safe_load((PROFILES_DIR / "tiny.yaml").read_text())
    section = values
    for key in path[:-1]:
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    section[path[-1]] = value
    return values


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e-320, 1e308]),
    st.text(st.characters(), max_size=20),
    st.sampled_from(["", " ", "\0", "a\nb", "\x1b[31m", "\u202e", "x" * 5000, "{}", "{0}", "%s", "~", "[", "s4://x"]),
    st.sampled_from(["caf\udce9", "\ud800", "\U0010ffff", "\ufeff"]),
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.booleans(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@given(st.sampled_from(PATHS), ODD)
@settings(max_examples=400)
def test_a_profile_with_any_value_gives_settings_or_a_settings_error(path: tuple[str, ...], value: Any):
    content = yaml.dump(changed(path, value), allow_unicode=True).encode(errors="surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        (profile := Path(folder) / "mine.yaml").write_bytes(content)
        try:
            load_settings(str(profile), {}).model_dump_json()
        except SettingsError as error:
            assert all(len(line) < 1500 for line in str(error).splitlines())


@given(st.sampled_from(PATHS), st.one_of(ODD.map(str), st.text(st.characters(), max_size=20)))
@settings(max_examples=400)
def test_a_variable_with_any_text_gives_settings_or_a_settings_error(path: tuple[str, ...], text: str):
    try:
        load_settings("tiny", {variable(*path): text}).model_dump_json()
    except SettingsError as error:
        # A setting that is right alone may need another one of its section, or contradict one of another section.
        alone = [variable(*path), ".".join(path)]
        together = [".".join(path[:-1]), ".".join(path[1:])] if len(path) > 2 else []
        assert any(name in str(error) for name in alone + together)


FIELD = st.one_of(
    st.sampled_from(["*", "*/5", "0", "7", "31", "1-5", "5-1", "1,3", "60", "99", "5/15", "*/0", "-1"]),
    st.sampled_from(["mon-fri", "fri-sun", "jan", "nov-feb", "feb", "a", "31-2", "5-1/2"]),
    st.sampled_from(["L", "l,30", "L5", "?", "?,1", "?/2", "1#1", "mon#5", "1#6", "1,2#2", "H", "R"]),
    st.from_regex(r"\A[0-9*/,-]{1,5}\Z"),
)  # fmt: skip


@given(st.lists(FIELD, min_size=4, max_size=6))
@settings(max_examples=300)
def test_a_cron_expression_that_is_taken_has_a_next_time_in_dagster(fields: list[str]):
    text = " ".join(fields)
    try:
        taken = load_settings("tiny", {"SBP_DEPLOYMENT__NIGHTLY": text}).deployment.nightly
    except SettingsError as error:
        assert "deployment.nightly (from SBP_DEPLOYMENT__NIGHTLY): is" in str(error)
    else:
        assert taken == text and is_valid_cron_schedule(text)
        assert next(schedule_execution_time_iterator(1e9, text, "UTC"))


@pytest.mark.parametrize(
    "text",
    [
        "0 2 * * *", "*/30 * * * *", "0 22 * * mon-fri", "5,35 1-6/2 1 JAN,jul *", "0 0 29 2 *", "0 0 * * 7",
        "@daily", "@Weekly", "@hourly", "@midnight", "@monthly", "@yearly", "@annually", "0 2 ? * *", "0 2 * * ?",
        "0 0 L * *", "0 0 1,l * *", "0 2 * * 1#1", "0 2 ? * mon#5", "0 2 * * L5", "0 2 * * fri-sun", "0 2 * * 5-1",
        "0 22-6 * * *", "0 2 28-3 nov-feb *",
    ],
)  # fmt: skip
def test_usual_cron_expressions_are_taken(text: str):
    assert is_valid_cron_schedule(text) and next(schedule_execution_time_iterator(1e9, text, "UTC"))
    assert load_settings("tiny", {"SBP_DEPLOYMENT__NIGHTLY_UNTIL": text}).deployment.nightly_until == text


@pytest.mark.parametrize(
    ("key", "wrong", "says"),
    [
        ("memory_limit", ["4", "-1GB", "4 apples", "0GB", "1KB", "inf", "80%"], "memory|out of range"),
        ("timezone", ["Mars/Phobos", "", "../UTC"], "IANA"),
        ("webserver_url", ["127.0.0.1:3000", "http://", "ftp://x"], "pattern"),
        ("judge_url", ["host/v1", "https:// x"], "pattern"),
        ("owners", ['["me"]', '["team:"]', '["a@b"]', '["a@b.c"]', '["a@b.photography"]'], "pattern"),
        ("overdue_days", ["0", "1000000000", "nan"], "Input should be"),
        ("wandb_project", ["a/b", ""], "pattern"),
        ("judge_retries", ["-1", "1000000"], "equal to"),
    ],
)
def test_texts_of_a_certain_form_and_numbers_out_of_range_are_refused(key: str, wrong: list[str], says: str):
    for text in wrong:
        with pytest.raises(SettingsError, match=rf"deployment\.{key}(\.0)? \(from .*({says})"):
            load_settings("tiny", {f"SBP_DEPLOYMENT__{key.upper()}": text})


@pytest.mark.parametrize("text", ["4GB", "512MB", "1.5TB", "8 GiB", "100mb"])
def test_memory_sizes_that_are_taken_are_duckdbs(text: str):
    import duckdb

    limit = load_settings("tiny", {"SBP_DEPLOYMENT__MEMORY_LIMIT": text}).deployment.memory_limit
    with duckdb.connect() as db:
        db.execute("SET memory_limit = ?", [limit])


@given(
    st.one_of(
        st.from_regex(r"\A[\w.%+-]{1,3}@[\w.-]{1,4}\.[\w]{1,8}\Z"),
        st.from_regex(r"\A(team:)?[\w.@-]{0,4}\Z"),
        st.text(max_size=9),
    )
)
@settings(max_examples=300)
def test_an_owner_that_is_taken_is_dagsters(owner: str):
    with contextlib.suppress(SettingsError):
        load_settings("tiny", {"SBP_DEPLOYMENT__OWNERS": json.dumps([owner])})
        assert is_valid_owner(owner)


def test_owners_that_are_taken_are_dagsters():
    from sbp_assets.definitions import build_definitions

    owners = '["team:a-b.c", "me+sbp@example.org"]'
    with warnings.catch_warnings(action="ignore"):
        defs = build_definitions(load_settings("tiny", {"SBP_DEPLOYMENT__OWNERS": owners}))
    assert set(next(iter(defs.resolve_all_asset_specs())).owners) == {"team:a-b.c", "me+sbp@example.org"}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("PRETRAINING__LEARNING_RATE", "inf"), ("PRETRAINING__LEARNING_RATE", "nan"), ("PRETRAINING__BETA2", "1"),
        ("CORPUS__SHARDS", "-1"), ("CORPUS__SHARDS", "1000000"), ("SYNTHESIS__TOP_P", "1.01"),
        ("PRETRAINING__REPETITIONS", "inf"), ("MODEL__LAYERS", "1000000000000"), ("SYNTHESIS__TEMPERATURE", "0"),
        ("CORPUS__DEDUP__THRESHOLD", "-0.1"), ("CORPUS__SOURCE__ZIPF_EXPONENT", "1e300"),
        ("PRETRAINING__SEEDS", "[true]"), ("SYNTHESIS__JUDGE__PROMPTS", "../v1"),
    ],
)  # fmt: skip
def test_numbers_of_the_experiment_are_finite_and_in_range(key: str, text: str):
    with pytest.raises(SettingsError, match=rf"\(from SBP_EXPERIMENT__{key}\)"):
        load_settings("tiny", {f"SBP_EXPERIMENT__{key}": text})
