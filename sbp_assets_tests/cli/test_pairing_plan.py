"""What a plan says of pairing on a cluster, against what the stage does and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbp_assets.cli.estimate import plan, render
from sbp_assets.cli.pairing_plan import BLOCK_QUERIES, UNEVEN, Stage, block_advice, pairing_stages
from sbp_assets.pairing.index import KeyBlock
from sbp_assets.pairing.quantizer import cell_count
from sbp_assets.settings import Pairing, Settings
from sbp_assets_tests.pairing.searches import fitted, indexed, sharded, unit
from sbp_assets_tests.profiles import load_profile

DIMENSIONS = 1024


def stages_of(documents: int, **settings: str) -> tuple[Settings, dict[str, Stage]]:
    chosen = load_profile("paper_200b", {f"SBP_{key.upper()}": value for key, value in settings.items()})
    found = pairing_stages(chosen, documents, DIMENSIONS, documents * 1000.0)
    return chosen, {stage.name: stage for stage in found}


def test_there_is_a_task_per_partition() -> None:
    settings, stages = stages_of(1_000_000)
    blocks, shards = settings.experiment.pairing.key_blocks, settings.experiment.corpus.shards
    tasks = {name: stage.tasks for name, stage in stages.items()}
    assert tasks == {
        "fit quantizer": 1, "index": shards, "search": blocks, "merge": shards, "filter": blocks, "pair": shards
    }  # fmt: skip


def comparing(stages: dict[str, Stage], documents: int) -> float:
    """Return the hours of the search's comparisons alone."""
    search = stages["search"]
    return search.core_hours - documents * search.tasks / BLOCK_QUERIES / 3600


def test_more_blocks_cost_reads_of_queries_and_no_comparisons_and_less_memory() -> None:
    _, few = stages_of(10_000_000, experiment__pairing__key_blocks="8")
    _, many = stages_of(10_000_000, experiment__pairing__key_blocks="16")
    queries = 10_000_000 * (4.0 * DIMENSIONS + 4 * 64)
    assert many["search"].moved - few["search"].moved >= 8 * queries
    assert comparing(many, 10_000_000) == pytest.approx(comparing(few, 10_000_000))
    assert many["search"].memory == few["search"].memory / 2


def test_search_grows_less_than_with_the_square() -> None:
    (_, small), (_, large) = stages_of(1_000_000), stages_of(4_000_000)
    growth = comparing(large, 4_000_000) / comparing(small, 1_000_000)
    assert growth == pytest.approx(8, rel=0.01), "n ** 1.5"
    assert large["filter"].core_hours / small["filter"].core_hours == pytest.approx(4)


def test_an_exhaustive_search_meets_every_key() -> None:
    _, ivf = stages_of(1_000_000)
    _, flat = stages_of(1_000_000, experiment__pairing__index="flat")
    cells, probes = cell_count(1_000_000), 64
    ratio = comparing(flat, 1_000_000) / comparing(ivf, 1_000_000)
    assert ratio == pytest.approx(cells / probes / UNEVEN, rel=0.01)


def test_a_block_that_does_not_fit_is_named_with_the_number_that_does() -> None:
    settings, stages = stages_of(100_000_000, deployment__memory_per_worker="2GB")
    advice = block_advice(settings, list(stages.values()))
    wanted = int(advice.split("pairing.key_blocks to ")[1].split()[0])
    assert wanted > settings.experiment.pairing.key_blocks
    enough = {"experiment__pairing__key_blocks": str(wanted), "deployment__memory_per_worker": "2GB"}
    settings, stages = stages_of(100_000_000, **enough)
    assert block_advice(settings, list(stages.values())) == ""


def test_the_memory_of_a_block_is_what_loading_it_asks_for(tmp_path: Path) -> None:
    ids = [f"d{row:04d}" for row in range(4000)]
    tables = sharded(ids, unit(4000, DIMENSIONS), [0] * 4000, 1)
    quantizer = fitted(tables, Pairing())
    _, stages = stages_of(4000, experiment__pairing__key_blocks="1", experiment__pairing__index="flat")
    paths, pieces, expected = indexed(tmp_path, tables, quantizer), quantizer.pieces(1), stages["search"].memory
    KeyBlock.load(paths, quantizer, pieces, 0, 5, tmp_path, memory=expected)
    with pytest.raises(ValueError, match="memory_per_worker"):
        KeyBlock.load(paths, quantizer, pieces, 0, 5, tmp_path, memory=expected - 1)


def test_a_small_corpus_has_no_table_for_a_cluster() -> None:
    assert "core-hours" not in render(plan(load_profile("demo"), {}))
    assert "core-hours" in render(plan(load_profile("paper_200b"), {}))
