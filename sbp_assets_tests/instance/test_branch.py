"""Branches of a finished store."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.instance.branch import branch_environment, make_branch, override, parse_changes
from sbp_assets.settings import Settings, SettingsError, load_settings
from sbp_assets.storage.artifacts import atomic_path, exclusive

CHANGES = {"synthesis.top_p": 0.5}
VALUES = st.one_of(st.floats(0.01, 0.9), st.integers(), st.sampled_from(["none", "null"]), st.lists(st.integers()))


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
    # Made once: what a branch has made stays.
    make_branch(settings, "placebo", CHANGES)
    assert branched.read_text() == "second"
    loaded = load_settings("tiny", made)
    assert loaded.deployment.data_dir == made["SBP_DEPLOYMENT__DATA_DIR"] and loaded.experiment.synthesis.top_p == 0.5


def test_records_are_copied_not_shared(settings: Settings) -> None:
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
        exclusive(Path(settings.deployment.instance_dir), "running `sbp run`"),
        pytest.raises(RuntimeError, match="running `sbp run`"),
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


@given(VALUES)
def test_overrides_read_back_as_given(value: object) -> None:
    name, text = override("synthesis.top_p", value)
    assert name == "SBP_EXPERIMENT__SYNTHESIS__TOP_P" and yaml.safe_load(text) == value


def test_changes_are_key_value_pairs() -> None:
    assert parse_changes(["synthesizer.epochs=2", "pretraining.seeds=[0, 1]", "synthesis.salt=a=b"]) == {
        "synthesizer.epochs": 2, "pretraining.seeds": [0, 1], "synthesis.salt": "a=b",
    }  # fmt: skip
    for wrong in ("synthesizer.epochs", "=2", "synthesis.salt={"):
        with pytest.raises(SettingsError):
            parse_changes([wrong])
