"""What the pairing stage takes on a cluster: tasks, memory of each, bytes moved and core-hours, from measured rates."""

from __future__ import annotations

from dataclasses import dataclass

from sbp_assets.pairing.index import BYTES_BESIDE, blocks_that_fit
from sbp_assets.pairing.quantizer import cell_count, sample_size
from sbp_assets.pairing.search import CODED_PER_NEIGHBOR
from sbp_assets.settings import Settings
from sbp_assets.settings.formats import memory_bytes

# Per second of one core with AVX-512, as `python -m benchmarks.pairing_rates` prints them (docs/scaling.md).
CELL_COMPONENTS = 1.25e10  # components of centres of cells that a document is compared with
KEY_COMPONENTS = 8.4e9  # components of keys' codes that a query is compared with
BLOCK_QUERIES = 1.1e4  # of a query and a block, beside the comparisons: choosing and comparing in full precision
INDEXED_DOCUMENTS = 9e4  # beside the choice of cells
MERGED_ROWS = 3e6
FILTERED_CANDIDATES = 4.5e3  # of documents of 600 words
PAIRS = 7e5
# Full cells are searched more often than others: keys that a query meets, over those in as many cells of even size.
UNEVEN = 1.2
# The largest block over the mean; at most 1.08 with salting (`python -m benchmarks.pairing` prints a balance).
UNEQUAL_BLOCKS = 1.1
# FLOP/s of one core in the matrix products of a fit (k-means), and its iterations.
FIT_FLOPS, FIT_ITERATIONS = 1e11, 10
# Of a candidate or a pair, compressed: ids, similarity and rank; of a query its id.
ROW_BYTES = 24


@dataclass(frozen=True)
class Stage:
    """One step: how many tasks, bytes of memory each, bytes read and written by all, hours of one core in all."""

    name: str
    tasks: int
    memory: float
    moved: float
    core_hours: float


def partial_rows(settings: Settings, documents: int) -> float:
    """Return the most rows that partial candidates have: pieces of a document's cells may lie in every block."""
    pairing = settings.experiment.pairing
    return float(documents) * CODED_PER_NEIGHBOR * pairing.neighbors * pairing.key_blocks


def pairing_stages(settings: Settings, documents: int, dimensions: int, text_bytes: float) -> list[Stage]:
    """Return the steps of the pairing stage after embedding, for so many documents of D.

    dimensions: of their vectors; text_bytes: of all documents' stored text. Every document is taken to have its full
    number of neighbours above the threshold, so pairs are an upper bound.
    """
    pairing, shards = settings.experiment.pairing, settings.experiment.corpus.shards
    blocks = pairing.key_blocks
    cells = cell_count(documents) if pairing.index == "ivf" else 1
    probes, sample = min(pairing.nprobe, cells), min(sample_size(cells), documents)
    vectors, codes = 4.0 * documents * dimensions, 1.0 * documents * dimensions
    queries = vectors + documents * (4 * probes + ROW_BYTES)
    met = documents * min(documents, UNEVEN * probes * documents / cells)
    found = partial_rows(settings, documents)
    candidates = documents * pairing.neighbors * (1 + pairing.both_directions)
    pairs = documents * min(pairing.max_pairs_per_document or candidates, candidates / documents)
    per_shard = documents / shards
    hours = 1 / 3600
    return [
        Stage("fit quantizer", 1, 4.0 * sample * dimensions * (1 + (pairing.centring is not None)), vectors,
              FIT_ITERATIONS * 2 * sample * cells * dimensions / FIT_FLOPS * hours),
        Stage("index", shards, per_shard * dimensions * 9, 2 * vectors + codes + documents * 4 * probes,
              documents * (cells * dimensions / CELL_COMPONENTS + 1 / INDEXED_DOCUMENTS) * hours),
        Stage("search", blocks, documents / blocks * (dimensions + BYTES_BESIDE),
              codes + vectors + blocks * queries + found * ROW_BYTES,
              (met * dimensions / KEY_COMPONENTS + documents * blocks / BLOCK_QUERIES) * hours),
        Stage("merge", shards, found / shards * 2 * ROW_BYTES,
              found * ROW_BYTES + documents * pairing.neighbors * ROW_BYTES, found / MERGED_ROWS * hours),
        Stage("filter", blocks, memory_bytes(settings.deployment.memory_limit),
              blocks * (text_bytes + documents * pairing.neighbors * ROW_BYTES),
              candidates / FILTERED_CANDIDATES * hours),
        Stage("pair", shards, pairs / shards * 2 * ROW_BYTES, 2 * pairs * ROW_BYTES, pairs / PAIRS * hours),
    ]  # fmt: skip


def block_advice(settings: Settings, stages: list[Stage]) -> str:
    """Return what to set where a block of keys does not fit a worker's memory, else an empty text."""
    search = next(stage for stage in stages if stage.name == "search")
    limit = memory_bytes(settings.deployment.memory_per_worker)
    if UNEQUAL_BLOCKS * search.memory <= limit:
        return ""
    return (
        f"A block of keys is larger than deployment.memory_per_worker ({settings.deployment.memory_per_worker}): set "
        f"pairing.key_blocks to {blocks_that_fit(search.memory * search.tasks, limit)} or more."
    )
