"""What a user does in Dagster's UI, in a real browser on a real webserver and daemon.

Screenshots go to $SBP_SCREENSHOTS (default build/screenshots). The tests build on one another: they share a deployment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from playwright.sync_api import Browser, expect

from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.pages import CHROMIUM, PATIENCE, Ui, chromium

SIGNATURES = "corpus/minhash_signatures"
STORED = dg.AssetCheckKey(dg.AssetKey(["corpus", "duplicates"]), "artifact_is_intact")
STAGES = ("corpus", "pairing", "pretraining", "synthesizer", "synthesis", "evaluation")

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt install chromium")


@pytest.fixture(scope="module")
def deployment(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("browser"), finished=finished) as deployment:
        deployment.start_webserver()
        deployment.start_daemon()
        yield deployment


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def ui(browser: Browser, deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[Ui]:
    ui = Ui(browser, deployment.url)
    yield ui
    ui.picture(f"{request.node.name}-end")
    ui.page.close()


def outcome(deployment: Deployment, check: dg.AssetCheckKey) -> str:
    """Status of the last execution of `check`."""
    with deployment.instance() as instance:
        latest = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])
    return latest[check].status.value if check in latest else ""


def test_the_lineage_graph_shows_every_stage_and_its_assets(ui: Ui) -> None:
    ui.open("/asset-groups")
    graph = ui.page.locator("svg")
    for stage in STAGES:
        ui.see(stage, graph)
    ui.picture("lineage")
    ui.see("pairing", graph).click()
    # What the opened stage shows without scrolling.
    for asset in ("ann_index", "partial_candidates", "neighbor_pairs"):
        ui.see(asset, graph)
    ui.open("/locations/sbp_assets/asset-groups/pairing/lineage")
    ui.see("neighbor_pairs", graph)
    ui.picture("lineage-of-pairing")
    ui.asset("pairing/neighbor_pairs", "lineage")
    for asset in ("documents", "neighbor_pairs", "tuning_examples", "report"):
        ui.see(asset, graph)
    ui.picture("lineage-of-an-asset")


def test_an_asset_shows_its_previews_and_plots(ui: Ui, deployment: Deployment) -> None:
    ui.asset("pairing/neighbor_pairs", "partitions", partition="00000")
    ui.shards(Materialized=2, Missing=0)
    pairs = pl.read_parquet(deployment.artifacts / "pairing/neighbor_pairs/00000.parquet")
    seeds = pl.read_parquet(deployment.artifacts / "corpus/documents/00000.parquet").filter(
        pl.col("id").is_in(pairs["d1"].implode())
    )["text"]
    expect(ui.metadata("dagster/row_count")).to_contain_text(str(len(pairs)))
    ui.see("[Show Markdown]", ui.metadata("preview")).click()
    ui.see("related", ui.page.get_by_role("dialog"))
    shown = " ".join(ui.page.get_by_role("dialog").inner_text().split())
    assert any(" ".join(text.split())[:100] in shown for text in seeds)
    ui.picture("preview")

    ui.asset("pretraining/baseline_model", "partitions", partition="0")
    ui.see("[Show Markdown]", ui.metadata("loss_curve")).click()
    plot = ui.page.get_by_role("dialog").locator("img")
    expect(plot).to_be_visible(timeout=PATIENCE)
    assert plot.evaluate("image => image.naturalWidth") > 0
    ui.picture("loss-curve")

    ui.asset("pairing/neighbor_pairs")
    ui.press("Plots")
    ui.see("candidates").scroll_into_view_if_needed()
    expect(ui.page.locator("canvas").first).to_be_visible(timeout=PATIENCE)
    ui.picture("plots")


def test_one_shard_is_materialised_and_turns_green(ui: Ui, deployment: Deployment) -> None:
    with deployment.instance() as instance:
        instance.wipe_assets([dg.AssetKey(SIGNATURES.split("/"))])
    ui.asset(SIGNATURES, "partitions", partition="00001")
    ui.shards(Materialized=0, Missing=2)
    ui.press("Materialize")
    dialog = ui.page.get_by_role("dialog")
    ui.see("1 partition", dialog)
    ui.press("Launch 1 run", dialog)
    # The counts and the shard's colour follow the run by themselves, its details when it is opened.
    ui.shards(Materialized=1, Missing=1, Failed=0)
    ui.asset(SIGNATURES, "partitions", partition="00001")
    expect(ui.metadata("dagster/row_count")).to_be_visible(timeout=PATIENCE)
    ui.see("Materialized")
    ui.picture("shard-green")


def test_a_backfill_of_all_shards_is_watched_to_its_end(ui: Ui, deployment: Deployment) -> None:
    before = deployment.versions(SIGNATURES)
    ui.asset(SIGNATURES, "partitions")
    ui.press("Materialize")
    dialog = ui.page.get_by_role("dialog")
    ui.press("All", dialog)
    ui.see("2 partitions", dialog)
    ui.picture("backfill-dialog")
    ui.press("Launch backfill", dialog)
    expect(dialog).to_be_hidden(timeout=PATIENCE)
    ui.open("/runs?tab=backfills")
    ui.page.locator("a[href*='/runs/b/']").first.click()
    ui.see("corpus / minhash_signatures")
    ui.see("100% completed")
    # Of the column, and of the status: the page follows the backfill by itself.
    expect(ui.page.get_by_text("Succeeded", exact=True)).to_have_count(2, timeout=PATIENCE)
    assert deployment.wait_backfill(ui.page.url.split("/")[-1]) == "COMPLETED_SUCCESS"
    ui.picture("backfill")
    ui.asset(SIGNATURES, "partitions")
    ui.shards(Materialized=2, Missing=0, Failed=0)
    assert deployment.versions(SIGNATURES) == before


def test_a_failed_check_says_why(ui: Ui, deployment: Deployment) -> None:
    path = deployment.artifacts / "corpus/duplicates.parquet"
    intact = path.read_bytes()
    path.write_bytes(intact[:-8] + bytes(8))
    try:
        ui.asset("corpus/duplicates", "checks", checkDetail=STORED.name)
        ui.press("Execute")
        wait_for(lambda: outcome(deployment, STORED) == "FAILED", "the check to fail")
    finally:
        path.write_bytes(intact)
    ui.asset("corpus/duplicates", "checks", checkDetail=STORED.name)
    ui.see("Failed")
    stored = deployment.versions("corpus/duplicates")["corpus/duplicates.parquet"]
    expect(ui.metadata("recorded")).to_contain_text(stored, timeout=PATIENCE)
    ui.picture("failed-check")


def test_stale_and_missing_shards_are_seen_after_a_change_of_settings(ui: Ui, deployment: Deployment) -> None:
    deployment.overrides |= {"SBP_EXPERIMENT__CORPUS__SHARDS": "3", "SBP_EXPERIMENT__PAIRING__MIN_SIMILARITY": "0.65"}
    deployment.port = 0
    deployment.start_webserver()
    ui.url = deployment.url
    ui.asset("pairing/neighbor_pairs", "partitions", partition="00000")
    ui.shards(Materialized=2, Missing=1)
    expect(ui.metadata("dagster/row_count")).to_be_visible(timeout=PATIENCE)
    ui.picture("missing-shard")
    ui.asset("corpus/source_manifest")
    stale = ui.page.get_by_text(re.compile(r"^Unsynced \(\d+\)$")).first
    expect(stale).to_be_visible(timeout=PATIENCE)
    stale.hover()
    expect(ui.page.get_by_text("code version", exact=False).first).to_be_visible(timeout=PATIENCE)
    ui.picture("stale")
