"""The sample of a corpus, and the settings of the pilot's store."""

import json
from pathlib import Path

import pytest

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.pilot.sample import FILE, FOLDER, draw, pilot_settings, write
from sbp_assets.settings import Corpus, FilesSource
from sbp_assets_tests.profiles import load_profile
from sbp_assets_tests.tiny import tiny_settings


def corpus(folder: Path, files: dict[str, int]) -> Corpus:
    for name, count in files.items():
        rows = [{"id": f"{name}-{row}", "text": f"document {row} of {name}"} for row in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_profile("text").experiment.corpus.model_copy(update={"source": FilesSource(path=str(folder))})


def test_a_sample_is_the_same_however_the_documents_are_spread_over_files(tmp_path: Path):
    for folder, files in (("one", {"a": 300, "b": 300}), ("other", {"a": 300, "b": 300, "empty": 0})):
        (tmp_path / folder).mkdir()
        corpus(tmp_path / folder, files)
    one, other = (draw(corpus(tmp_path / name, {}), 150) for name in ("one", "other"))
    assert [d.id for d in one.documents] == [d.id for d in other.documents]
    assert (one.read, one.whole, len(one.documents)) == (600, True, 150)
    # By chance: about as many of each file.
    assert 50 < sum(d.id.startswith("a-") for d in one.documents) < 100


def test_of_a_corpus_that_is_larger_than_what_is_read_a_part_is_said_to_be_read(tmp_path: Path):
    sample = draw(corpus(tmp_path, {"a": 300, "b": 300}), 150, most_read=300)
    assert (sample.read, sample.whole) == (300, False)
    assert len({d.id[0] for d in sample.documents}) == 1
    assert draw(corpus(tmp_path, {}), 150, most_read=600).whole


def test_a_corpus_of_too_few_documents_is_refused_with_their_number(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"corpus\.source holds 99 documents; a pilot needs 100 at least"):
        draw(corpus(tmp_path, {"a": 99}), 150)


def test_generated_corpora_are_sampled(tmp_path: Path):
    sample = draw(tiny_settings(tmp_path).experiment.corpus, 150)
    assert (len(sample.documents), sample.read, sample.whole) == (150, 400, True)


def test_the_pilots_store_is_apart_and_its_settings_are_those_of_the_user(tmp_path: Path):
    settings = tiny_settings(tmp_path / "own", {"experiment.pairing.min_similarity": 0.61})
    home = tmp_path / "pilot"
    own = pilot_settings(settings, home / "tuning", home, 0.4, 0.1, pretraining={"synthetic_share": 0.01})
    deployment = own.deployment
    for folder in (deployment.data_dir, deployment.work_dir, deployment.instance_dir):
        assert Path(folder).parent == home / "tuning"
    assert own.experiment.pairing == settings.experiment.pairing
    assert own.experiment.model == settings.experiment.model
    changed = {"synthetic_share": 0.01}
    assert own.experiment.pretraining == settings.experiment.pretraining.model_copy(update=changed)
    write(draw(settings.experiment.corpus, 120), home)
    lines = (home / FOLDER / FILE).read_text().splitlines()
    assert len(lines) == 120
    assert own.experiment.corpus.source == FilesSource(path=str(home / FOLDER))
