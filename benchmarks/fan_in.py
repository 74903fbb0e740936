"""Peak memory of each fan-in, and how it grows with the corpus: python -m benchmarks.fan_in [CASE ...] [--times 1 4].

A fan-in reads every shard. Each is given generated shards of one size, more of them each time (--times; the base is
that of the case), and measured in a process of its own, which has done the same with a few documents before, so that
imports and pools are there already. From outside its memory is looked at every 2 ms:

- own: bytes of the process's own (anonymous) memory at the peak, less those before;
- resident: the same of all that it holds, mapped files included. Those the system takes back when it needs the room,
  and the processes of a machine share them.

`exponent` is that of the growth of own memory with the documents, between the first size and the last;
`bytes_per_document` what each further document takes of it. DuckDB is given 64 MB, so that all sizes reach it. Seconds
are of the processor. The last line is one JSON object.

Cases: order (training's index of documents: the first rows of the paper's oracle, and those of its third epoch), budget
(token_budget of three arms), budget_checks (ids of all arms), examples (tuning_examples of two pairs a document),
example_checks, tasks (the sample of held-out documents), tokenizer (words as many as Heaps' law gives), contamination,
quality_table, pair_truth and posterior.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.arguments import parser
from benchmarks.machine import describe
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import HELDOUT, ORACLE, UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, stream_texts, train_tokenizer
from sbp_assets.evaluation import contamination
from sbp_assets.evaluation.task_files import sample_heldout
from sbp_assets.pairing.ground_truth import pair_truth
from sbp_assets.pretraining import audit, budget
from sbp_assets.settings import ConceptsSource, Contamination, Dedup, Model, Pretraining
from sbp_assets.storage.paths import row_count, scan_table
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesis.posterior_table import posterior_over_shards
from sbp_assets.synthesis.quality import REAL, SYNTHETIC, duplicates_over_shards
from sbp_assets.synthesizer.audit import check_contents, check_examples
from sbp_assets.synthesizer.examples import write_examples
from sbp_assets.training.order import StreamOrder
from sbp_assets.training.spec import Source, StreamData

MEMORY_LIMIT = "64MB"
VOCABULARY, BOS, EOS, RELATED, CONTEXT = 30_000, 0, 1, 3, 2048
MODEL = Model(hidden_size=64, layers=1, heads=1, kv_heads=1, head_dim=64, intermediate_size=64, context_length=CONTEXT)
PRETRAINING = Pretraining(tokens_per_step=2 * CONTEXT, repetitions=8, learning_rate=1e-3)
WORLD = ConceptWorld(ConceptsSource(documents=1, concepts=150))


def ids(shard: int, count: int) -> pl.Series:
    """Return ids as a corpus without its own has them, 24 characters long."""
    return pl.Series([f"{'file'}-{shard:06d}-{row:012d}" for row in range(count)])


def splits(rng: np.random.Generator, count: int) -> pl.Series:
    """Return a split for each document: a third D, as many of the oracle's as make six in ten, a few held out."""
    return pl.Series([UNIQUE, ORACLE, HELDOUT])[rng.choice(3, count, p=[0.35, 0.63, 0.02])]


def token_shards(folder: Path, shards: int, size: int) -> None:
    """Write tokens, pairs and synthetic tokens of short documents."""
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    before = None
    for shard in range(shards):
        names, key = ids(shard, size), f"{shard:05d}"
        lengths = rng.integers(6, 14, size)
        encoded = np.split(rng.integers(4, VOCABULARY, int(lengths.sum())), np.cumsum(lengths)[:-1])
        table = pl.DataFrame({"id": names, "split": splits(rng, size)})
        write_token_arrays(folder / "tokens" / key, table, encoded, VOCABULARY)
        unique = names.filter(table["split"] == UNIQUE)
        # Partners are documents of the shard before, and of the shard itself.
        others = [unique.shuffle(seed=shard), unique if before is None else before.head(len(unique))]
        parts = [pl.DataFrame({"d1": unique[: len(other)], "d2": other}) for other in others]
        pl.concat(parts).filter(pl.col("d1") != pl.col("d2")).write_parquet(folder / "pairs" / f"{key}.parquet")
        seeds = unique.sample(size, with_replacement=True, seed=shard)
        made = pl.DataFrame({"id": names.str.replace("file", "made"), "seed_id": seeds})
        write_token_arrays(folder / "synthetic" / key, made, encoded, VOCABULARY)
        before = unique


def text_shards(folder: Path, shards: int, size: int) -> None:
    """Write documents of 75 words, of which the different ones grow with the corpus to the power of 2/3."""
    rng = np.random.default_rng(0)
    (folder / "documents").mkdir(parents=True)
    for shard in range(shards):
        words = rng.zipf(1.5, (size, 75)) % 10**12
        texts = [" ".join(np.base_repr(word, 36).lower() for word in row) for row in words]
        table = pl.DataFrame({"id": ids(shard, size), "text": texts, "split": splits(rng, size)})
        table.write_parquet(folder / "documents" / f"{shard:05d}.parquet")


def concept_shards(folder: Path, shards: int, size: int) -> None:
    """Write documents of the world of concepts, their tokens, pairs and synthetic documents."""
    tokenizer = train_tokenizer((WORLD.document(number)["text"] for number in range(500)), 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("documents", "pairs", "synthetic"):
        (folder / name).mkdir()
    for shard in range(shards):
        names, key = ids(shard, size), f"{shard:05d}.parquet"
        texts = [WORLD.document(shard * size + row)["text"] for row in range(size)]
        table = pl.DataFrame({"id": names, "text": texts, "split": [UNIQUE] * size})
        table.write_parquet(folder / "documents" / key)
        encoded = encode_documents(tokenizer, texts)
        write_token_arrays(folder / "tokens" / f"{shard:05d}", table.drop("text"), encoded, 1024)
        pl.DataFrame({"d1": names, "d2": names.reverse()}).write_parquet(folder / "pairs" / key)
        pl.DataFrame({"seed_id": names, "text": texts[::-1]}).write_parquet(folder / "synthetic" / key)


def tables(folder: Path) -> dict[str, pl.LazyFrame]:
    """Return the Parquet files of a folder by shard."""
    return {path.stem: scan_table(path) for path in sorted(folder.iterdir())}


def files(folder: Path) -> dict[str, Path]:
    """Return the paths of the Parquet files of a folder by shard."""
    return {path.stem: path for path in sorted(folder.iterdir())}


def directories(folder: Path) -> dict[str, Path]:
    """Return the token arrays of a folder by shard."""
    return {path.name: path for path in sorted(folder.iterdir())}


def order(folder: Path) -> None:
    """Read rows of the first epoch and of the third, as a training process does."""
    tokens = directories(folder / "tokens")
    sources = [Source(directory=path, split=split) for split in (UNIQUE, ORACLE) for path in tokens.values()]
    with tempfile.TemporaryDirectory(dir=folder) as index:
        stream = StreamOrder(StreamData(repeated=sources), CONTEXT, 0, Path(index))
        rows = 2 * int(sum(budget.count_tokens(tokens)["tokens"])) // CONTEXT
        for start in (0, rows):
            assert len(stream.rows(start, start + 2).input_ids) == 2


def arms(folder: Path) -> Iterator[budget.ArmPlan]:
    """Yield what each arm reads."""
    tokens, synthetic = directories(folder / "tokens"), directories(folder / "synthetic")
    for arm in budget.ARMS:
        yield budget.plan_arm(arm, PRETRAINING, tokens, synthetic if arm == "sbp" else None)


def token_budget(folder: Path) -> None:
    """Count what the arms read, and the cost of generation."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for plan in arms(folder):
            budget.arm_rows(plan, CONTEXT, 0, 1.0, Path(scratch))
    budget.generation_cost(directories(folder / "tokens"), directories(folder / "synthetic"), 64, MODEL, VOCABULARY)


def budget_checks(folder: Path) -> None:
    """Look for documents that are trained on and held out, seeds outside D, and ids that are there twice."""
    tokens, synthetic = directories(folder / "tokens"), directories(folder / "synthetic")
    heldout = [Source(directory=path, split=HELDOUT) for path in tokens.values()]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        given = Path(scratch), MEMORY_LIMIT
        assert not any(audit.leaked_documents(plan.data, heldout, *given) for plan in arms(folder))
        assert not audit.foreign_seeds(synthetic, tokens, *given) and not audit.repeated_ids(synthetic, *given)


def examples(folder: Path) -> None:
    """Write the tuning examples of all pairs."""
    shutil.rmtree(folder / "examples", ignore_errors=True)
    pairs, tokens = tables(folder / "pairs"), directories(folder / "tokens")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_examples(folder / "examples", pairs, tokens, RELATED, 64, VOCABULARY, Path(scratch), MEMORY_LIMIT)


def example_checks(folder: Path) -> None:
    """Check the tuning examples; whether they are well formed is not looked at: the tokens are random."""
    if not (folder / "examples").exists():
        examples(folder)
    directory, tokens, pairs = folder / "examples", directories(folder / "tokens"), files(folder / "pairs")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        count, given = sum(map(row_count, pairs.values())), (Path(scratch), MEMORY_LIMIT)
        check_examples(directory, tokens, count, CONTEXT, RELATED, EOS, *given)
        found = check_contents(directory, pairs, tokens, RELATED, 64, False, *given)
        assert not found, found


def tasks(folder: Path) -> None:
    """Sample the held-out documents."""
    assert len(sample_heldout(tables(folder / "documents"), 5)) == 5


def tokenizer(folder: Path) -> None:
    """Train a tokenizer of D."""
    train_tokenizer((text for batch in stream_texts(tables(folder / "documents"), UNIQUE) for text in batch), 2048)


def contaminated(folder: Path) -> None:
    """Compare 200 items with all documents."""
    documents = tables(folder / "documents")
    first = next(iter(documents.values())).head(200).collect()
    items = first.select(evaluation_set=pl.lit("heldout"), item="id", text="text")
    with Progress("contamination", "documents") as progress:
        contamination.compare(items, contamination.training_documents(documents, {}), Contamination(), progress)


def quality_table(folder: Path) -> None:
    """Find the duplicates in samples of 300 documents of both corpora."""
    documents = tables(folder / "documents")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        duplicates_over_shards({SYNTHETIC: documents, REAL: documents}, 300, Dedup(), Path(scratch), MEMORY_LIMIT)


def truth(folder: Path) -> None:
    """Compare pairs with the ground truth."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pair_truth(files(folder / "pairs"), tables(folder / "documents"), WORLD, 8, Path(scratch), MEMORY_LIMIT)


def posterior(folder: Path) -> None:
    """Compare synthetic documents with the posterior predictive."""
    loaded = load_tokenizer(folder / "tokenizer")
    synthetic, tokens = tables(folder / "synthetic"), directories(folder / "tokens")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        posterior_over_shards(WORLD, synthetic, tokens, loaded, 64, Path(scratch), MEMORY_LIMIT)


@dataclass(frozen=True)
class Case:
    """What is measured of which corpus: `shards` of `size` documents are the base."""

    run: Callable[[Path], None]
    prepare: Callable[[Path, int, int], None]
    shards: int
    size: int


CASES = {
    **{
        name: Case(run, token_shards, 4, 50_000)
        for name, run in {
            "order": order,
            "budget": token_budget,
            "budget_checks": budget_checks,
            "examples": examples,
            "example_checks": example_checks,
        }.items()
    },
    **{
        name: Case(run, text_shards, 4, 2000)
        for name, run in {
            "tasks": tasks,
            "tokenizer": tokenizer,
            "contamination": contaminated,
            "quality_table": quality_table,
        }.items()
    },
    **{name: Case(run, concept_shards, 4, 1000) for name, run in {"pair_truth": truth, "posterior": posterior}.items()},
}
FEW = "few"


def child(case: Case, folder: Path) -> None:
    """Run the case on a few documents, wait for a line, and run it on the corpus: the measured process."""
    case.run(folder / FEW)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # The peak of the resident set is that from here on.
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.process_time()
    case.run(folder)
    print(json.dumps({"seconds": time.process_time() - started, "resident": status("self")["VmHWM"]}), flush=True)


def status(process: str | int) -> dict[str, int]:
    """Return the bytes that the system tells of a process's memory, by their names in /proc."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Return bytes of own memory and of resident memory at the peak, less those before, and seconds."""
    command = [sys.executable, "-m", "benchmarks.fan_in", name, "--folder", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{name} failed: see above")
        before = status(process.pid)
        peak = before["RssAnon"]
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            with suppress(KeyError, FileNotFoundError, ProcessLookupError):  # It has ended.
                peak = max(peak, status(process.pid)["RssAnon"])
            time.sleep(0.002)
        told = json.loads(process.stdout.read())
    return {
        "own": peak - before["RssAnon"],
        "resident": told["resident"] - before["VmRSS"],
        "seconds": told["seconds"],
    }


def grown(names: list[str], times: list[int]) -> dict[str, Any]:
    """Return the rows of cases of one corpus by size, the exponent of own memory and the bytes of one more document."""
    case = CASES[names[0]]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for factor in times:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            case.prepare(folder, case.shards * factor, case.size)
            (folder / FEW).mkdir()
            case.prepare(folder / FEW, 2, 500)
            if "example_checks" in names:  # What they check is not theirs to write.
                examples(folder)
            for name in names:
                found = measure(name, folder)
                row = {"documents": case.shards * factor * case.size}
                row |= {f"{kind}_mb": round(found[kind] / 1e6, 1) for kind in ("own", "resident")}
                rows[name].append({**row, "seconds": round(found["seconds"], 1)})
                print(f"{name}: {json.dumps(rows[name][-1])}", flush=True)
    return {name: {"rows": found, **growth(found[0], found[-1])} for name, found in rows.items()}


def growth(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
    """Return the exponent of own memory between two sizes, and the bytes of it that one more document takes."""
    of_memory = max(last["own_mb"], 0.1) / max(first["own_mb"], 0.1)
    return {
        "exponent": round(math.log(of_memory) / math.log(last["documents"] / first["documents"]), 2),
        "bytes_per_document": round(
            (last["own_mb"] - first["own_mb"]) * 1e6 / (last["documents"] - first["documents"]), 1
        ),
    }


def main() -> None:
    taking = parser(__doc__)
    taking.add_argument("cases", nargs="*", default=list(CASES), help="some of the cases")
    taking.add_argument("--times", type=int, nargs="+", default=[1, 4], help="sizes, as multiples of the base")
    taking.add_argument("--folder", type=Path, help="measure the one case on what is there, in this process")
    given = taking.parse_args()
    if unknown := set(given.cases) - set(CASES):
        taking.error(f"no such case: {', '.join(sorted(unknown))}")
    if given.folder:
        child(CASES[given.cases[0]], given.folder)
        return
    if len(given.times) < 2:
        taking.error("give two sizes or more")
    corpora: dict[Any, list[str]] = {}
    for name in given.cases:
        corpora.setdefault(CASES[name].prepare, []).append(name)
    cases: dict[str, Any] = {}
    for names in corpora.values():
        cases |= grown(names, given.times)
    print(json.dumps({"machine": describe(), "cases": cases}))


if __name__ == "__main__":
    main()
