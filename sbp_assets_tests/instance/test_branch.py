"""Branches of a finished store."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.instance.branch import branch_environment, make_branch, overrides, parse_changes
from sbp_assets.instance.storage import InstanceInUseError, exclusive_instance
from sbp_assets.settings import Settings, SettingsError, load_settings
from sbp_assets.storage.artifacts import atomic_path

CHANGES = {"synthesis.top_p": 0.5}
CHANGED = st.one_of(
    st.tuples(st.just("synthesis.top_p"), st.floats(0.01, 0.9)),
    st.tuples(st.just("synthesis.quality_sample"), st.integers(1, 2**53)),
    st.tuples(st.just("pairing.both_directions"), st.booleans()),
    st.tuples(st.just("synthesis.salt"), st.sampled_from(["none", "null", "007", "a=b", "[0"])),
    st.tuples(st.just("corpus.max_chars"), st.none() | st.integers(1, 2**53)),
    st.tuples(st.just("pretraining.seeds"), st.lists(st.integers(0, 2**53), min_size=1, unique=True).map(tuple)),
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    names = ("data_dir", "work_dir", "instance_dir")
    directories = {f"SBP_DEPLOYMENT__{name.upper()}": str(tmp_path / "own" / name) for name in names}
    settings = load_settings("tiny", directories)
    monkeypatch.setenv("SBP_PROFILE", "tiny")
    for folder in (tmp_path / "own/data_dir/stage", tmp_path / "own/instance_dir/history"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("first")
    with closing(sqlite3.connect(tmp_path / "own/instance_dir/history/runs.db")) as database, database:
        database.execute("create table runs (id text)")
        database.execute("insert into runs values ('one')")
    return settings


def test_a_branch_shares_artifacts_until_one_is_replaced(settings: Settings) -> None:
    make_branch(settings, "placebo", CHANGES)
    made = branch_environment(settings, "placebo")
    own = Path(settings.deployment.data_dir) / "stage/file"
    branched = Path(made["SBP_DEPLOYMENT__DATA_DIR"]) / "stage/file"
    assert branched.samefile(own)
    with atomic_path(branched) as temporary:
        temporary.write_text("second")
    assert own.read_text() == "first" and branched.read_text() == "second"
    # A branch is created once: what it has materialised stays.
    make_branch(settings, "placebo", CHANGES)
    assert branched.read_text() == "second"
    loaded = load_settings("tiny", made)
    assert loaded.deployment.data_dir == made["SBP_DEPLOYMENT__DATA_DIR"] and loaded.experiment.synthesis.top_p == 0.5


def test_the_run_and_event_storage_is_copied_not_shared(settings: Settings) -> None:
    own = Path(settings.deployment.instance_dir)
    with closing(sqlite3.connect(own / "history/runs.db")) as live:
        live.execute("pragma journal_mode=wal")
        live.execute("insert into runs values ('in the log')")
        live.commit()  # in the write-ahead log alone, as a running webserver leaves it
        make_branch(settings, "placebo", CHANGES)
    instance = Path(branch_environment(settings, "placebo")["SBP_DEPLOYMENT__INSTANCE_DIR"])
    assert not (instance / "history/file").samefile(own / "history/file")
    with closing(sqlite3.connect(instance / "history/runs.db")) as copy:
        assert copy.execute("select count(*) from runs").fetchone() == (2,)
    assert not (instance / "lock").exists()


def test_stores_beside_each_other_have_branches_of_their_own(settings: Settings, tmp_path: Path) -> None:
    make_branch(settings, "placebo", CHANGES)
    (tmp_path / "own/other").mkdir()
    other = settings.deployment.model_copy(update={"data_dir": str(tmp_path / "own/other")})
    with pytest.raises(SettingsError, match="no branch placebo"):
        branch_environment(settings.model_copy(update={"deployment": other}), "placebo")


def test_what_cannot_be_branched(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="letters"):
        make_branch(settings, "../up", CHANGES)
    with pytest.raises(SettingsError, match="top_p"):
        make_branch(settings, "placebo", {"synthesis.top_p": 7})
    with (
        exclusive_instance(settings, "running `sbp run`"),
        pytest.raises(InstanceInUseError, match="running `sbp run`"),
    ):
        make_branch(settings, "placebo", CHANGES)
    remote = load_settings("tiny", {"SBP_DEPLOYMENT__DATA_DIR": "s3://bucket/x"})
    with pytest.raises(SettingsError, match="local"):
        make_branch(remote, "placebo", CHANGES)
    empty = load_settings("tiny", {"SBP_DEPLOYMENT__DATA_DIR": os.devnull})
    with pytest.raises(SettingsError, match="sbp run"):
        make_branch(empty, "placebo", CHANGES)
    make_branch(settings, "placebo", CHANGES)
    with pytest.raises(SettingsError, match="take another name"):
        make_branch(settings, "placebo", {"synthesis.top_p": 0.6})
    with pytest.raises(SettingsError, match="there are placebo"):
        branch_environment(settings, "another")


def test_a_branch_is_the_same_where_its_settings_are_however_they_are_written(settings: Settings) -> None:
    make_branch(settings, "longer", {"synthesizer.epochs": 2, "pretraining.seeds": [0, 1]})
    make_branch(settings, "longer", parse_changes(["synthesizer.epochs=2.0", "pretraining.seeds=[0,1]"]))
    with pytest.raises(SettingsError, match="take another name"):
        make_branch(settings, "longer", {"synthesizer.epochs": 2})


@given(CHANGED)
def test_changes_are_loaded_as_given(change: tuple[str, Any]) -> None:
    key, value = change
    experiment: Any = load_settings("tiny", overrides({key: value})).experiment
    for part in key.split("."):
        experiment = getattr(experiment, part)
    assert experiment == value


def test_changes_are_key_value_pairs_whose_values_are_read_as_the_environments_are() -> None:
    changes = parse_changes(["synthesizer.epochs=2", "pretraining.seeds=[0, 1]", "synthesis.salt=a=b"])
    assert changes == {"synthesizer.epochs": "2", "pretraining.seeds": "[0, 1]", "synthesis.salt": "a=b"}
    experiment = load_settings("tiny", overrides(changes | parse_changes(["corpus.split.salt=007"]))).experiment
    assert (experiment.synthesizer.epochs, experiment.pretraining.seeds) == (2, (0, 1))
    assert (experiment.synthesis.salt, experiment.corpus.split.salt) == ("a=b", "007")
    for wrong in ("synthesizer.epochs", "=2"):
        with pytest.raises(SettingsError):
            parse_changes([wrong])


def test_a_branch_may_be_a_second_round_of_its_own_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("data_dir", "work_dir", "instance_dir"):
        monkeypatch.setenv(f"SBP_DEPLOYMENT__{key.upper()}", str(tmp_path / key))
        (tmp_path / key).mkdir()
    monkeypatch.setenv("SBP_PROFILE", "tiny")
    settings = load_settings()
    make_branch(settings, "second", {"synthesizer.earlier_round": settings.deployment.data_dir})
    branch = load_settings(environ={**os.environ, **branch_environment(settings, "second")})
    assert branch.experiment.synthesizer.earlier_round == settings.deployment.data_dir
