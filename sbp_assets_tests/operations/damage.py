"""Ways in which each kind of artifact can be wrong, each with the check that has to find it.

`python -m sbp_assets_tests.operations.damage --write` rewrites the tables of docs/checks.md; without it, prints them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

PAGE = Path(__file__).parents[2] / "docs/checks.md"
Harm = Callable[[Path], None]
SHARD, OTHER_SHARD, BLOCK, SEED = "00000", "00001", "00000", "0"
# Documents of profile tiny's first shard.
A_HELDOUT, AN_ORACLE_DOCUMENT, ANOTHER = "concepts-0000114", "concepts-0000000", "concepts-0000002"


@dataclass(frozen=True)
class Damage:
    """What is wrong with an artifact, the check ("stage/name:check") that fails, and the asset that it stops."""

    what: str
    artifact: str
    partition: str | None
    harm: Harm
    check: str
    downstream: str | None

    @property
    def checked(self) -> str:
        """The asset that the check is of: the damaged one, or a later one that first sees all shards."""
        return self.check.split(":")[0]

    def path(self, store: Path) -> Path:
        whole = store / self.artifact / (self.partition or "")
        return whole if whole.is_dir() else whole.with_name(f"{whole.name}.parquet")


def of(artifact: str, partition: str | None, downstream: str | None, *ways: tuple[str, Harm, str]) -> list[Damage]:
    """Return the ways in which one artifact is damaged, given as (what, harm, check).

    A check of the artifact itself goes by its bare name. `downstream` is an asset that is then not materialised, None
    where no asset reads the artifact or the check stops none.
    """
    return [
        Damage(what, artifact, partition, harm, check if ":" in check else f"{artifact}:{check}", downstream)
        for what, harm, check in ways
    ]


def table(change: Callable[[pl.DataFrame], pl.DataFrame], file: str = "") -> Harm:
    """Change the rows of a Parquet artifact, or of a Parquet `file` in a directory."""

    def harm(path: Path) -> None:
        target = path / file if file else path
        change(pl.read_parquet(target)).write_parquet(target)

    return harm


def column(**values: pl.Expr) -> Harm:
    return table(lambda rows: rows.with_columns(**values))


def first(name: str, value: object) -> Harm:
    """Another value in the first row."""
    return column(**{name: pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(value)).otherwise(name)})


def of_the_other_shard(path: Path) -> None:
    other = path.with_name(path.name.replace(SHARD, OTHER_SHARD))
    (shutil.copytree if path.is_dir() else shutil.copy)(
        other, path, **({"dirs_exist_ok": True} if path.is_dir() else {})
    )


def truncated(file: str) -> Harm:
    def harm(path: Path) -> None:
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[: len(content) // 2])

    return harm


def tokens(change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Harm:
    """Change the token lists of the documents, the offsets with them."""

    def harm(path: Path) -> None:
        flat, offsets = np.load(path / "tokens.npy"), np.load(path / "offsets.npy")
        parts = change(np.split(flat, offsets[1:-1]))
        np.save(path / "tokens.npy", np.concatenate(parts))
        np.save(path / "offsets.npy", np.cumsum([0, *map(len, parts)]))

    return harm


def fewer_examples(path: Path) -> None:
    tokens(lambda parts: parts[::2])(path)
    table(lambda rows: rows.gather_every(2), "documents.parquet")(path)


def heldout_text_in_training(rows: pl.DataFrame) -> pl.DataFrame:
    leaked = rows.filter(pl.col("split") == "heldout")["text"][0]
    row = pl.int_range(pl.len()).over("split") == 0
    return rows.with_columns(
        text=pl.when(row & (pl.col("split") == "oracle")).then(pl.lit(leaked.upper())).otherwise("text")
    )


def vectors(change: Callable[[np.ndarray], np.ndarray]) -> Harm:
    def rows(found: pl.DataFrame) -> pl.DataFrame:
        changed = change(found["vector"].to_numpy().copy()).astype(np.float32)
        return found.with_columns(vector=pl.Series(changed, dtype=found.schema["vector"]))

    return table(rows)


def nan_vector(array: np.ndarray) -> np.ndarray:
    array[3, 7] = np.nan
    return array


def index_of_other_embeddings(path: Path) -> None:
    codes = np.load(path / "codes.npy")
    np.save(path / "codes.npy", np.random.default_rng(0).integers(0, 256, codes.shape, np.uint8))


def index_of_other_cells(path: Path) -> None:
    np.save(path / "probes.npy", np.load(path / "probes.npy") + 1)


def quantizer_of_other_ranges(path: Path) -> None:
    import faiss

    index = faiss.read_index(str(path / "quantizer.faiss"))
    index.sq.train(np.full((2, index.d), [[1.0], [2.0]], np.float32))
    faiss.write_index(index, str(path / "quantizer.faiss"))


def without_a_shard(path: Path) -> None:
    (path / f"{OTHER_SHARD}.parquet").unlink()


def lower_case(path: Path) -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": {"type": "Lowercase"}}))


def nan_weight(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(path / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def half_the_steps(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("step") <= rows["step"].max() // 2)  # type: ignore[operator]


def a_row_of_nulls(rows: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([rows, pl.DataFrame([dict.fromkeys(rows.columns)], schema=rows.schema)])


def duplicate(rows: pl.DataFrame, kind: str, kept: str) -> pl.DataFrame:
    row = {"id": ANOTHER, "shard": 0, "kept_id": kept, "kept_shard": 0, "jaccard": 0.9, "kind": kind}
    return pl.concat([rows, pl.DataFrame([row], schema=rows.schema)])


def shuffled_pairs(rows: pl.DataFrame) -> pl.DataFrame:
    """Other partners, each from its own shard, none of them d1 itself."""
    sides = ["d2", "d2_shard"]
    other = rows.select(sides)[(np.arange(len(rows)) + len(rows) // 2) % len(rows)]
    return rows.with_columns(other).filter(pl.col("d1") != pl.col("d2")).unique(["d1", "d2"], maintain_order=True)


def did_not_learn(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(train_loss=pl.col("train_loss").reverse(), heldout_loss=pl.col("heldout_loss").reverse())


def script(path: Path) -> None:
    page = path / "index.html"
    page.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))


def questions(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Harm:
    return table(change, "data/sbp_concept_questions.test.parquet")


def shifted(name: str) -> pl.Expr:
    """The column's values moved down a row, the last one to the top."""
    return pl.col(name).gather((pl.int_range(pl.len()) - 1) % pl.len())


def where(condition: pl.Expr, name: str, value: object) -> Harm:
    """Another value of a column in the rows that meet the condition."""
    return column(**{name: pl.when(condition).then(value).otherwise(name)})


def without(condition: pl.Expr) -> Harm:
    return table(lambda rows: rows.filter(~condition))


dropped = table(lambda rows: rows.filter(pl.int_range(pl.len()) % 7 != 3))


def a_leak(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(contained=pl.col("judged"), contained_share=pl.lit(1.0))


DAMAGES = [
    *of("corpus/source_manifest", None, "corpus/raw_documents",
        ("a file is missing", table(lambda rows: rows[1:]), "shard_assignment_is_correct"),
        ("files are in other shards", column(shard=pl.col("shard").reverse()), "shard_assignment_is_correct")),
    *of("corpus/raw_documents", SHARD, "corpus/minhash_signatures",
        ("rows dropped", dropped, "every_row_is_accounted_for"),
        ("an id twice", column(id=pl.col("id").gather((pl.int_range(pl.len()) - 1).clip(0))),
         "raw_documents_are_valid"),
        ("blank texts", first("text", " "), "raw_documents_are_valid"),
        ("the documents of another shard", of_the_other_shard, "raw_documents_are_valid")),
    *of("corpus/rejected_rows", SHARD, "corpus/minhash_signatures",
        ("a row that was never read", table(a_row_of_nulls), "corpus/raw_documents:every_row_is_accounted_for")),
    *of("corpus/minhash_signatures", SHARD, "corpus/duplicates",
        ("rows dropped", dropped, "signatures_match_documents"),
        ("signatures of other texts", column(text_sha256=shifted("text_sha256")), "signatures_match_documents")),
    *of("corpus/duplicates", None, "corpus/documents",
        ("what is kept does not exist", table(lambda rows: duplicate(rows, "near", "nowhere")), "kept_documents_exist"),
        ("a document that repeats nothing", table(lambda rows: duplicate(rows, "near", AN_ORACLE_DOCUMENT)),
         "duplicates_are_correct_and_complete")),
    *of("corpus/documents", SHARD, "corpus/tokens",
        ("rows dropped", dropped, "documents_match_raw_documents"),
        ("ids swapped", column(text=shifted("text")), "documents_match_raw_documents"),
        ("held-out documents in D", where(pl.col("split") == "heldout", "split", pl.lit("unique")),
         "documents_match_raw_documents"),
        ("a held-out text in a training document", table(heldout_text_in_training),
         "corpus/tokenizer:heldout_documents_are_not_in_training_splits")),
    *of("corpus/tokenizer", None, "corpus/tokens",
        ("it changes what it encodes", lower_case, "tokenizer_round_trips")),
    *of("corpus/tokens", SHARD, "synthesizer/tuning_examples",
        ("doubled tokens", tokens(lambda parts: [np.tile(part, 2) for part in parts]), "tokens_match_documents"),
        ("a truncated file", truncated("tokens.npy"), "tokens_match_documents"),
        ("tokens of other documents", tokens(lambda parts: parts[1:] + parts[:1]), "tokens_decode_to_documents")),
    *of("pairing/embeddings", SHARD, "pairing/quantizer",
        ("NaN in a vector", vectors(nan_vector), "embeddings_are_unit_vectors"),
        ("rows dropped", dropped, "embeddings_are_unit_vectors"),
        ("ids swapped", column(id=shifted("id")), "embeddings_match_documents")),
    *of("pairing/quantizer", None, "pairing/ann_index",
        ("ranges of other vectors", quantizer_of_other_ranges, "codes_keep_directions")),
    *of("pairing/ann_index", SHARD, "pairing/partial_candidates",
        ("codes of other vectors", index_of_other_embeddings, "index_matches_embeddings"),
        ("other cells to be searched", index_of_other_cells, "index_matches_embeddings"),
        ("the index of another shard", of_the_other_shard, "index_matches_embeddings")),
    *of("pairing/partial_candidates", BLOCK, "pairing/neighbor_candidates",
        ("a shard is missing", without_a_shard, "partials_are_of_the_block"),
        ("similarities shuffled", table(lambda rows: rows.with_columns(pl.col("similarity").reverse()),
                                        f"{SHARD}.parquet"), "partials_are_of_the_block")),
    *of("pairing/neighbor_candidates", SHARD, "pairing/neighbor_edges",
        ("rows dropped", dropped, "candidates_are_nearest_neighbors"),
        ("neighbours shuffled", column(neighbor_id=pl.col("neighbor_id").reverse()),
         "candidates_are_nearest_neighbors"),
        ("similarities shuffled", column(similarity=pl.col("similarity").reverse()),
         "candidates_are_nearest_neighbors"),
        ("neighbours of a shard that does not exist", column(neighbor_shard=pl.lit("99999")),
         "candidates_are_known_over_all_shards")),
    *of("pairing/neighbor_edges", BLOCK, "pairing/neighbor_pairs",
        ("edges dropped", table(lambda rows: rows.gather_every(2), "edges.parquet"), "edges_are_related_and_capped"),
        ("a pair twice", table(lambda rows: pl.concat([rows, rows[:1]]), "edges.parquet"),
         "edges_are_related_and_capped")),
    *of("pairing/neighbor_pairs", SHARD, "synthesizer/tuning_examples",
        ("pairs shuffled", table(shuffled_pairs), "pairs_match_candidates"),
        ("a held-out d2", first("d2", A_HELDOUT), "pairs_are_related_and_distinct"),
        ("a pair twice", table(lambda rows: pl.concat([rows, rows[:1]])), "pairs_are_related_and_distinct"),
        ("the pairs of another shard", of_the_other_shard, "pairs_are_distinct_over_all_shards")),
    *of("pairing/pair_truth", None, "evaluation/report",
        ("a share that its counts do not give", first("precision", 0.99), "pair_precision_is_above_chance")),
    *of("synthesizer/tuning_examples", None, "synthesizer/checkpoint",
        ("examples dropped", fewer_examples, "examples_are_well_formed"),
        ("examples of other pairs", table(lambda rows: rows.with_columns(d2=shifted("d2")), "documents.parquet"),
         "examples_are_well_formed"),
        ("tokens of other examples", tokens(lambda parts: parts[1:] + parts[:1]), "examples_are_well_formed")),
    *of("synthesizer/checkpoint", None, "synthesis/synthetic_documents",
        ("a truncated checkpoint", truncated("model.safetensors"), "synthesizer_loads"),
        ("NaN in the weights", nan_weight, "weights_are_finite"),
        ("it did not learn", table(did_not_learn, "metrics.parquet"), "conditional_loss_decreases")),
    *of("pretraining/baseline_model", SEED, "evaluation/training_dynamics",
        ("a truncated checkpoint", truncated("model.safetensors"), "model_loads"),
        ("NaN in the losses", table(lambda rows: rows.with_columns(heldout_loss=float("nan")), "metrics.parquet"),
         "training_loss_decreases")),
    *of("pretraining/oracle_model", SEED, "evaluation/training_dynamics",
        ("NaN in the weights", nan_weight, "weights_are_finite")),
    *of("pretraining/sbp_model", SEED, "evaluation/training_dynamics",
        ("an arm with half the budget", table(half_the_steps, "metrics.parquet"), "training_tokens_match_budget")),
    *of("synthesis/synthetic_documents", SHARD, "synthesis/synthetic_tokens",
        ("rows dropped", table(lambda rows: rows.gather_every(2)), "rollouts_are_contiguous"),
        ("the end is missing", table(lambda rows: rows[:-3]), "synthetic_tokens_reach_budget"),
        ("texts swapped", column(text=shifted("text")), "rows_match_requests"),
        ("blank texts", first("text", ""), "rows_are_valid"),
        ("a held-out seed document", first("seed_id", A_HELDOUT), "ids_are_unique_and_seeds_in_unique_split"),
        ("of another synthesizer", column(synthesizer_version=pl.lit("another")), "rows_match_requests"),
        ("of two engines", where(pl.int_range(pl.len()) % 3 == 0, "engine", pl.lit("another")),
         "rows_match_requests")),
    *of("synthesis/synthetic_tokens", SHARD, "pretraining/token_budget",
        ("doubled tokens", tokens(lambda parts: [np.tile(part, 2) for part in parts]),
         "synthetic_tokens_match_documents"),
        ("documents dropped", fewer_examples, "synthetic_tokens_match_documents")),
    *of("synthesis/synthetic_tokens", SHARD, "pretraining/sbp_model",
        ("held-out leakage", table(lambda rows: rows.with_columns(seed_id=pl.lit(A_HELDOUT)),
                                   "documents.parquet"),
                                   "pretraining/token_budget:heldout_documents_are_not_trained_on")),
    *of("synthesis/quality", SHARD, "synthesis/quality_table",
        ("rows dropped", dropped, "quality_is_valid"),
        ("a value that its counts do not give", first("value", 0.7), "quality_is_valid")),
    *of("synthesis/judgements", None, "synthesis/quality_table",
        ("verdicts without a judge", table(a_row_of_nulls), "judgements_are_valid")),
    *of("synthesis/quality_table", None, "evaluation/report",
        ("a value that its counts do not give", first("value", 0.7), "quality_table_is_valid")),
    *of("synthesis/novelty", None, "evaluation/report",
        ("rows dropped", dropped, "novelty_is_valid")),
    *of("synthesis/posterior_predictive", None, "evaluation/report",
        ("rows dropped", dropped, "posterior_table_is_valid")),
    *of("pretraining/token_budget", None, "pretraining/sbp_model",
        ("an arm with another budget", where(pl.col("arm") == "sbp", "tokens_read", pl.col("tokens_read") // 2),
         "arms_train_on_equal_tokens"),
        ("synthetic documents read twice", where(pl.col("source") == "synthetic", "most_reads", 2),
         "synthetic_documents_are_read_once")),
    *of("evaluation/tasks", None, "evaluation/contamination",
        ("questions dropped", questions(lambda rows: rows[1:]), "task_data_matches_corpus"),
        ("answers shuffled", questions(lambda rows: rows.with_columns(answer=3 - pl.col("answer"))),
         "task_data_matches_corpus"),
        ("training documents among the held-out ones", table(
            lambda rows: rows.with_columns(id=pl.lit(AN_ORACLE_DOCUMENT)), "data/sbp_heldout.test.parquet"),
         "task_data_matches_corpus")),
    *of("evaluation/sbp_scores", SEED, "evaluation/comparison",
        ("a task is missing", without(pl.col("task") == "heldout"), "scores_are_complete_and_valid"),
        ("a metric is missing", without(pl.col("metric") == "acc"), "scores_are_complete_and_valid"),
        ("a value that its samples do not give", where(pl.col("task") == "heldout", "value", pl.col("value") / 2),
         "scores_are_complete_and_valid")),
    *of("evaluation/comparison", None, "evaluation/report",
        ("a gain with the other sign", column(delta_sbp=-pl.col("delta_sbp")), "comparison_matches_scores"),
        ("rows dropped", dropped, "comparison_matches_scores")),
    *of("evaluation/training_dynamics", None, "evaluation/report",
        ("a curve ends early", without((pl.col("arm") == "sbp") & (pl.col("tokens") > pl.col("tokens").max() / 2)),
         "training_curves_span_the_same_tokens")),
    *of("evaluation/contamination", None, "evaluation/report",
        ("an evaluation set is missing", without(pl.col("evaluation_set") == "heldout"),
         "every_evaluation_set_is_compared")),
    *of("evaluation/contaminated_items", None, "evaluation/report",
        ("rows dropped", dropped, "evaluation/contamination:every_evaluation_set_is_compared")),
    *of("evaluation/contamination", None, None,
        ("held-out documents are in the training text", table(a_leak),
         "evaluation_items_are_not_in_training_documents")),
    *of("evaluation/contaminated_items", None, None,
        ("other documents", column(document=shifted("document")), "listed_documents_contain_ngrams")),
    *of("evaluation/report", None, None, ("a script in the page", script, "page_is_self_contained")),
]  # fmt: skip


def table_of_checks() -> str:
    """Return the Markdown table of every check of profile `tiny`, in the order of the data flow."""
    from sbp_assets.definitions import build_definitions
    from sbp_assets.settings import load_settings
    from sbp_assets.storage.checks import NAME

    graph = build_definitions(load_settings("tiny", {})).resolve_asset_graph()
    checks = [graph.get(key) for key in graph.asset_check_keys]
    order = {key: place for place, key in enumerate(graph.toposorted_asset_keys)}
    lines = ["| artifact | check | what it guards | blocks |", "|---|---|---|---|"]
    every = next(check for check in checks if check.key.name == NAME)
    lines.append(f"| every one | `{NAME}` | {every.description} | yes |")
    for check in sorted(checks, key=lambda check: (order[check.key.asset_key], not check.blocking, check.key.name)):
        if check.key.name != NAME:
            blocks = "yes" if check.blocking else "no"
            artifact = check.key.asset_key.to_user_string()
            lines.append(f"| `{artifact}` | `{check.key.name}` | {check.description} | {blocks} |")
    return "\n".join(lines)


def table_of_damage() -> str:
    """Return the Markdown table of every damage, the check that fails, and the asset that is then not materialised."""
    lines = ["| artifact | damage | check that fails | not materialised |", "|---|---|---|---|"]
    for damage in DAMAGES:
        of_own = damage.checked == damage.artifact
        check = damage.check.split(":")[1] if of_own else damage.check
        stopped = damage.downstream or "nothing is downstream"
        lines.append(f"| `{damage.artifact}` | {damage.what} | `{check}` | {stopped} |")
    return "\n".join(lines)


def write_tables() -> None:
    """Replace the last two tables of docs/checks.md by those of the present checks and damages."""
    page = PAGE.read_text(encoding="utf-8")
    checks, damage = list(re.finditer(r"(?:^\|.*\n)+", page, flags=re.MULTILINE))[-2:]
    between = page[checks.end() : damage.start()]
    PAGE.write_text(
        f"{page[: checks.start()]}{table_of_checks()}\n{between}{table_of_damage()}\n{page[damage.end() :]}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the tables of docs/checks.md.")
    parser.add_argument("--write", action="store_true", help="Rewrite them in the page instead.")
    if parser.parse_args().write:
        write_tables()
    else:
        print(table_of_checks(), table_of_damage(), sep="\n\n")
