"""De-duplication beside datatrove's MinHash on the same documents and cores, and its growth with the corpus.

    python -m benchmarks.dedup CORPUS [--documents N] [--rounds N] [--cores N] [--peer-python PATH] [--sizes N N …]

CORPUS is a folder of JSON-lines files with a `text` (.jsonl, .jsonl.zst), or `generated`: documents of 20,000 words in
Zipf's distribution. A tenth of the documents get a copy in which one run of words is replaced, so that its similarity
with the original is about a number drawn from 0.6 to 1.0. Documents lie in 8 files, copies anywhere among them.

Both methods read the files and say what to drop, in processes that are kept to the same cores, by turns. Told are
seconds of the processor and by the clock (imports left out), the median of the rounds' ratios, and

- precision: the share of dropped documents that reach the threshold of 0.8 with the document kept in their place, by
  the exact Jaccard similarity of word shingles, computed here once more;
- recall: the share of planted pairs of that similarity or more of which one is dropped, by similarity.

datatrove is no dependency: PATH is the Python of an environment with `datatrove[processing]`, `orjson` and `spacy`.
Without it our own part runs alone.

Growth (--sizes; without a number it is left out) is measured on N near-copies of short texts in shards of 4,000, each
copy far away from its original: seconds of the processor and the peak resident set of `corpus/duplicates` alone, in a
process of its own, under a memory limit of 80 MB. The exponents are those of a power of N, of memory without what the
imports take. Then the last shard is added to the others: with the similarities that the others have left, the result
has to be the same. The last line is a JSON object.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl

from benchmarks import machine
from benchmarks.arguments import parser
from benchmarks.word_measures import texts
from sbp_assets.corpus.dedup import find_duplicates, signatures
from sbp_assets.corpus.shingles import jaccard, shingled
from sbp_assets.settings import Dedup
from sbp_assets.storage.progress import Progress

FILES, COPIES = 8, 0.1
SHARD = 4000  # Documents of a shard in the measurement of growth.
MEMORY_LIMIT = "80MB"  # Small, so that both sizes reach it.
VOCABULARY = [f"{'bcdfghklmnprstv'[n % 15]}{'aeiou'[n // 15 % 5]}{n}" for n in range(20_000)]
SIMILARITIES = (0.6, 0.7, 0.8, 0.9, 1.0)
PEER = Path(__file__).with_name("dedup_datatrove.py")


def generated(count: int, words: int, seed: int = 0) -> list[str]:
    """Return `count` texts of about so many words, drawn by Zipf's law."""
    rng = random.Random(seed)
    weights = [1 / (rank + 10) for rank in range(len(VOCABULARY))]
    return [" ".join(rng.choices(VOCABULARY, weights, k=rng.randint(words // 2, 2 * words))) for _ in range(count)]


def copy_of(text: str, similarity: float, rng: random.Random, shingle_words: int) -> str:
    """Return `text` with a run of its words replaced, so that about `similarity` of all shingles are shared."""
    words = text.split(" ")
    replaced = round((1 - similarity) / (1 + similarity) * len(words)) - shingle_words + 1
    if replaced > 0:
        start = rng.randrange(len(words) - replaced)
        words[start : start + replaced] = [f"new{rng.randrange(10**9)}" for _ in range(replaced)]
    return " ".join(words)


def write_files(folder: Path, documents: list[tuple[str, str]], files: int) -> None:
    """Write (id, text) to `files` files of JSON lines, 00000.jsonl and so on."""
    size = math.ceil(len(documents) / files)
    for number in range(files):
        part = pl.DataFrame(documents[number * size : (number + 1) * size], schema=["id", "text"], orient="row")
        part.write_ndjson(folder / f"{number:05d}.jsonl")


def plant(corpus: str, count: int, folder: Path, rng: random.Random) -> list[tuple[str, str]]:
    """Write the documents of a corpus and copies of a tenth of them; return the ids of the originals and copies."""
    found = generated(count, 300) if corpus == "generated" else texts(corpus, count)
    documents = [(f"d{number}", text) for number, text in enumerate(found)]
    pairs = []
    for name, text in rng.sample(documents, round(COPIES * len(documents))):
        documents.append((f"copy-of-{name}", copy_of(text, rng.uniform(0.6, 1), rng, Dedup().shingle_words)))
        pairs.append((name, documents[-1][0]))
    rng.shuffle(documents)
    write_files(folder, documents, FILES)
    return pairs


def read_files(folder: Path) -> dict[str, pl.DataFrame]:
    """Return the tables (id, text) by their numbers."""
    schema = {"id": pl.String, "text": pl.String}
    return {path.stem: pl.read_ndjson(path, schema=schema) for path in sorted(folder.glob("*.jsonl"))}


def sign(folder: Path) -> None:
    """Write documents and signatures of the files in `folder`, one at a time, as the assets do."""
    with Progress("signatures", "documents") as progress:
        for key, frame in read_files(folder).items():
            frame.write_parquet(folder / f"documents-{key}.parquet")
            signatures(frame, Dedup(), progress).write_parquet(folder / f"signatures-{key}.parquet")


def find(folder: Path, store: Path | None) -> dict[str, Any]:
    """Return seconds, peak memory and counts of `corpus/duplicates`, and [id, kept id] of what it drops."""
    documents, signed = (
        {path.stem.split("-")[1]: pl.scan_parquet(path) for path in sorted(folder.glob(f"{kind}-*.parquet"))}
        for kind in ("documents", "signatures")
    )
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with Progress("duplicates", "pairs") as progress, tempfile.TemporaryDirectory(dir=folder) as scratch:
        dropped, counts = find_duplicates(documents, signed, Dedup(), Path(scratch), MEMORY_LIMIT, progress, store)
    processor, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = dropped.filter(pl.col("kind") != "id").select("id", "kept_id").rows()
    return {
        "processor": processor,
        "mb": peak // 1024,  # Of kilobytes on Linux.
        "mb_of_imports": imports // 1024,
        **counts,
        "dropped": found,
    }


def ours(folder: Path) -> dict[str, Any]:
    """Return seconds of reading, signing and finding, and what is dropped."""
    started, before = time.perf_counter(), time.process_time()
    sign(folder)
    found = find(folder, None)
    return {**found, "seconds": time.perf_counter() - started, "processor": time.process_time() - before}


def in_process(command: list[str], cores: int) -> dict[str, Any]:
    """Return the JSON that a command prints, which is kept to `cores` cores and has as many threads."""
    threads = {name: str(cores) for name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **threads}, preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def part(name: str, folder: Path, cores: int, *more: str) -> dict[str, Any]:
    """Return what a part of this benchmark measures in a process of its own."""
    return in_process([sys.executable, "-m", "benchmarks.dedup", str(folder), "--part", name, *more], cores)


def judged(dropped: list[tuple[str, str]], folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return precision and recall, by similarity, of the pairs (dropped id, kept id)."""
    settings = Dedup()
    known = dict(pl.concat(read_files(folder).values()).iter_rows())
    wanted = sorted({name for pair in [*dropped, *pairs] for name in pair})
    sets = {
        name: text.shingles
        for name, text in zip(wanted, shingled((known[name] for name in wanted), settings.shingle_words), strict=True)
    }
    right = sum(jaccard(sets[a], sets[b]) >= settings.threshold for a, b in dropped)
    gone = {name for name, _ in dropped}
    planted = [(jaccard(sets[a], sets[b]), a in gone or b in gone) for a, b in pairs]

    def recall(low: float, high: float) -> tuple[int, float | None]:
        flags = [found for similarity, found in planted if low <= similarity < high]
        return len(flags), round(sum(flags) / len(flags), 4) if flags else None

    return {
        "dropped": len(dropped),
        "precision": round(right / max(len(dropped), 1), 4),
        "recall": recall(settings.threshold, math.inf),
        "by_similarity": {
            f"{low} to {high}": recall(low, high if high < 1 else math.inf) for low, high in pairwise(SIMILARITIES)
        },
    }


def beside(corpus: str, count: int, rounds: int, cores: int, peer: str | None) -> dict[str, Any]:
    """Return speeds, precision and recall of both."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pairs = plant(corpus, count, folder, random.Random(0))
        times: dict[str, list[dict[str, Any]]] = {"ours": [], "datatrove": []}
        for number in range(rounds):
            times["ours"].append(part("ours", folder, cores))
            if peer:
                out = folder / f"peer{number}"
                times["datatrove"].append(in_process([peer, str(PEER), str(folder), str(out), str(cores)], cores))
        result: dict[str, Any] = {"documents": count + len(pairs), "planted": len(pairs), "cores": cores}
        for name, found in times.items():
            if not found:
                continue
            dropped = found[0]["dropped"]
            if name == "datatrove":
                ids = {
                    (int(key), row): name
                    for key, frame in read_files(folder).items()
                    for row, name in enumerate(frame["id"])
                }
                dropped = [(ids[f, r], ids[kept_f, kept_r]) for f, r, kept_f, kept_r in dropped]
            result[name] = {
                **{kind: round(median(once[kind] for once in found), 2) for kind in ("processor", "seconds")},
                **judged([(a, b) for a, b in dropped], folder, pairs),
            }
            print(name, json.dumps(result[name]), flush=True)
    if peer:
        for kind in ("processor", "seconds"):
            ratios = [theirs[kind] / mine[kind] for mine, theirs in zip(times["ours"], times["datatrove"], strict=True)]
            result[f"ratio_of_{kind}"] = round(median(ratios), 2)
            print(f"datatrove takes {median(ratios):.2f} times our {kind}", flush=True)
    return result


def growth(sizes: list[int], cores: int) -> dict[str, Any]:
    """Return seconds and peak memory of near-copies of each of `sizes`, and the exponents between first and last."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as made:
            folder, rng = Path(made), random.Random(0)
            originals = generated(size // 2, 60)
            copies = [(f"c{n}", f"{text} {rng.randrange(10**9)}") for n, text in enumerate(originals)]
            rng.shuffle(copies)
            write_files(folder, [*((f"o{n}", text) for n, text in enumerate(originals)), *copies], size // SHARD)
            part("sign", folder, cores)
            last = [folder / f"{kind}-{size // SHARD - 1:05d}.parquet" for kind in ("documents", "signatures")]
            whole = part("find", folder, cores)
            for path in last:
                path.rename(path.with_suffix(".later"))
            part("find", folder, cores, "--store", str(store := folder / "store"))
            for path in last:
                path.with_suffix(".later").rename(path)
            added = part("find", folder, cores, "--store", str(store))
        assert added["dropped"] == whole["dropped"] and len(whole["dropped"]) == size // 2
        row = {
            "documents": size,
            "pairs": whole["candidate_pairs"],
            **{name: round(whole[name], 2) for name in ("processor", "mb", "mb_of_imports")},
            "processor_of_one_more_shard": round(added["processor"], 2),
            "pairs_of_one_more_shard": added["compared_pairs"],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    first, last_row = rows[0], rows[-1]
    octaves = math.log(last_row["documents"] / first["documents"])
    of_memory = (last_row["mb"] - last_row["mb_of_imports"]) / (first["mb"] - first["mb_of_imports"])
    return {
        "rows": rows,
        "exponent_of_time": round(math.log(last_row["processor"] / first["processor"]) / octaves, 2),
        "exponent_of_memory": round(math.log(of_memory) / octaves, 2),
    }


def parts(name: str, folder: Path, store: Path | None) -> dict[str, Any]:
    """Return what the part `name` measures in this process."""
    if name == "sign":
        sign(folder)
        return {}
    return ours(folder) if name == "ours" else find(folder, store)


def usable(peer: str | None) -> Iterator[str]:
    """Yield `peer` if that Python has datatrove; say why not otherwise."""
    if peer is None:
        print("datatrove: skipped, for there is no --peer-python with it")
    elif subprocess.run([peer, "-c", "import datatrove.pipeline.dedup"], capture_output=True).returncode:
        print(f"datatrove: skipped, for {peer} cannot import it")
    else:
        yield peer


def main() -> None:
    taking = parser(__doc__)
    taking.add_argument("corpus")
    taking.add_argument("--documents", type=int, default=4000)
    taking.add_argument("--rounds", type=int, default=3)
    taking.add_argument("--cores", type=int, default=1)
    taking.add_argument("--peer-python")
    taking.add_argument("--sizes", type=int, nargs="*", default=[32_000, 128_000])
    taking.add_argument("--part", choices=("sign", "find", "ours"), help="measure this alone, in this process")
    taking.add_argument("--store", type=Path, help="with --part find: the file of similarities")
    chosen = taking.parse_args()
    if chosen.part:
        print(json.dumps(parts(chosen.part, Path(chosen.corpus), chosen.store)))
        return
    peer = next(usable(chosen.peer_python), None)
    result = beside(chosen.corpus, chosen.documents, chosen.rounds, chosen.cores, peer) if chosen.rounds else {}
    if len(chosen.sizes) > 1:
        result["growth"] = growth(chosen.sizes, chosen.cores)
    print(json.dumps({"corpus": Path(chosen.corpus).name, **result, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
