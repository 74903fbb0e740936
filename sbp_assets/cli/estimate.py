"""What a profile would materialise and cost, computed from its settings: nothing is trained and nothing generated.

Of a corpus in files the first file is read. Estimates carry their assumptions as the named constants below; `render`
prints those it used. No dagster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from sbp_assets.cli.pairing_plan import ROW_BYTES, Stage, block_advice, pairing_stages, partial_rows
from sbp_assets.pretraining.budget import budget_steps
from sbp_assets.settings import ConceptsSource, Corpus, Experiment, FilesSource, FiveTokensSource, HubSource, Settings

# Dense bfloat16 peak of an H100 SXM and of an H200 (NVIDIA data sheets; both use the same chip).
GPU_NAME, GPU_FLOPS = "H100/H200 SXM", 989e12
# Model FLOPs utilisation: 0.38-0.43 was reported for Llama 3 pretraining on H100 (arXiv 2407.21783, table 4).
TRAINING_MFU = 0.4
# Sampling is bound by memory traffic, not arithmetic: an assumption for large batches, to be replaced by a measurement.
GENERATION_MFU = 0.15
EMBEDDING_MFU = 0.3
# FLOP/s of one CPU process with one thread on models of a few million parameters: 2 x 5M parameters x 5,000 tokens/s.
CPU_FLOPS = 5e10
# Above this, seconds on a CPU are not worth printing.
CPU_PARAMETERS = 100e6

# DCLM in the paper: 482B unique tokens in 582M documents. For sources whose documents cannot be sampled.
TOKENS_PER_DOCUMENT = 828
# English web text under a byte-level BPE; a small trained vocabulary gives fewer bytes per token.
BYTES_PER_TOKEN = 4.5
# Tokens per word of the concepts corpus, <bos> and <eos> included, by entries of its own BPE. Measured on D of the
# profiles demo and tiny, which differ by 10%: 512 entries give 2.6 and 2.3. With 1,280 nearly every word is one token.
TOKENS_PER_WORD = {264: 5.2, 300: 4.0, 512: 2.4, 1024: 1.6, 1280: 1.4, 2048: 1.3}
# zstd on text in Parquet.
TEXT_COMPRESSION = 0.4
# Vocabulary of Llama 3, assumed for a named tokenizer: its files are not read here. Four special tokens are added.
NAMED_VOCABULARY = 128_256 + 4
# Embedding models: (parameters that a token passes through, vector width); the first stands for others, too.
EMBEDDING_MODELS = {
    "Qwen/Qwen3-Embedding-0.6B": (440e6, 1024),
    "all-MiniLM-L6-v2": (10.7e6, 384),
}
_SAMPLE = 200

# Of free-software documentation under its own 4,096-token BPE, as the text profile trains one (docs/results.md); larger
# vocabularies hold more characters per token.
CHARACTERS_PER_TOKEN = 3.3


@dataclass(frozen=True)
class Work:
    """One piece of computing: tokens processed, FLOPs, and time on the stated hardware."""

    name: str
    tokens: float
    flops: float
    gpu_hours: float
    cpu_seconds: float  # of one process


@dataclass(frozen=True)
class Estimate:
    """What follows from the expected size of D. Tokens are whole training tokens, bytes are on disk."""

    basis: str
    unique_tokens: int
    unique_documents: int
    steps: int
    budget: int
    arms: dict[str, dict[str, int]]  # arm -> source -> tokens read
    epochs: dict[str, dict[str, float]]  # arm -> source -> times read
    work: list[Work]
    bytes: dict[str, float]  # artifact -> bytes over all partitions
    pairing: list[Stage]  # after embedding
    block_too_large: str  # what to do about it; empty where a block fits


@dataclass(frozen=True)
class Plan:
    """A profile's graph and, where the size of D can be estimated, its cost."""

    profile: str
    assets: dict[str, int]  # asset key -> partitions
    shards: int
    seeds: int
    vocab_size: int
    parameters: int
    flops_per_token: float
    processes: int
    estimate: Estimate | None


def corpus_size(experiment: Experiment) -> tuple[int, int, str] | None:
    """Return the expected tokens and documents of D before de-duplication, and their basis; None where nothing says.

    corpus.expected_unique_tokens decides. Else `concepts` documents are counted as words of a generated sample,
    `five_tokens` by their mean length, a `hub` source with max_documents as documents of DCLM's mean length, and
    `files` by reading the first of them.
    """
    corpus = experiment.corpus
    if corpus.expected_unique_tokens:
        documents = corpus.expected_unique_documents or round(corpus.expected_unique_tokens / TOKENS_PER_DOCUMENT)
        return corpus.expected_unique_tokens, max(1, documents), "corpus.expected_unique_tokens"
    if isinstance(corpus.source, ConceptsSource):
        from sbp_assets.corpus.concepts import ConceptWorld

        world = ConceptWorld(corpus.source)
        count = min(_SAMPLE, corpus.source.documents)
        words = fmean(len(world.document(number)["text"].split()) for number in range(count))
        documents = max(1, round(corpus.source.documents * corpus.split.unique))
        # The BPE is trained on these documents; a named one is larger than any that they could give.
        ratio = tokens_per_word(NAMED_VOCABULARY if corpus.tokenizer.name else corpus.tokenizer.vocab_size)
        basis = (
            f"{corpus.source.documents:,} documents of {words:.0f} words (a generated sample of {count}), taken to be "
            f"{ratio:.2g} tokens each with this vocabulary"
        )
        return round(documents * words * ratio), documents, basis
    if isinstance(corpus.source, FiveTokensSource):
        documents = max(1, round(corpus.source.documents * corpus.split.unique))
        length = corpus.source.tokens_per_document + 2  # <bos> and <eos>
        return documents * length, documents, f"{corpus.source.documents:,} documents of {length} tokens on average"
    if isinstance(corpus.source, HubSource) and corpus.source.max_documents:
        documents = max(1, round(corpus.source.max_documents * corpus.split.unique))
        return documents * TOKENS_PER_DOCUMENT, documents, f"max_documents of {TOKENS_PER_DOCUMENT} tokens"
    if isinstance(corpus.source, FilesSource):
        return _files_size(corpus, corpus.source)
    return None


def tokens_per_word(vocab_size: int) -> float:
    """Return the tokens per word of the concepts corpus, interpolated in the logarithm of the vocabulary's size."""
    sizes, ratios = list(TOKENS_PER_WORD), list(TOKENS_PER_WORD.values())
    return float(np.interp(math.log(vocab_size), [math.log(size) for size in sizes], ratios))


def _files_size(corpus: Corpus, source: FilesSource) -> tuple[int, int, str] | None:
    """Return corpus_size of a files source, by its first file, which stands for all; None where that is unreadable."""
    from sbp_assets.corpus.errors import CorpusError
    from sbp_assets.corpus.readers import read_rows
    from sbp_assets.corpus.rows import Document, Fields, RowMaker, cut_at_word
    from sbp_assets.corpus.source_files import Root, naming_path

    try:
        root = Root(source.path)
        files, _ = root.files()
        with naming_path(source.path):
            sizes = [root.fs.size(root.full(file)) for file in files]
        sample, digest, _ = root.describe(files[0])
        fields = Fields.of(source)
        rows = read_rows(root, files[0], RowMaker(files[0], root.name, fields, corpus.max_row_bytes, Counter()), digest)
        characters = [len(cut_at_word(row.text, corpus.max_chars)) for row in rows if isinstance(row, Document)]
    except CorpusError:
        return None
    if not characters:
        return None
    scale = sum(sizes) / max(1, sample) * corpus.split.unique
    basis = f"{len(characters):,} documents of {files[0]}, the first of {len(files):,} files, scaled by size, "
    basis += f"at {CHARACTERS_PER_TOKEN} characters per token"
    tokens = round(sum(characters) / CHARACTERS_PER_TOKEN * scale)
    return max(1, tokens), max(1, round(len(characters) * scale)), basis


def plan(settings: Settings, assets: Mapping[str, int]) -> Plan:
    """Return the plan of `settings`; `assets` is the number of partitions by asset key, as the definitions have it."""
    experiment = settings.experiment
    tokenizer = experiment.corpus.tokenizer
    vocab_size = NAMED_VOCABULARY if tokenizer.name else tokenizer.vocab_size
    size = corpus_size(experiment)
    return Plan(
        profile=settings.profile,
        assets=dict(assets),
        shards=experiment.corpus.shards,
        seeds=len(experiment.pretraining.seeds),
        vocab_size=vocab_size,
        parameters=experiment.model.parameters(vocab_size),
        flops_per_token=experiment.model.flops_per_token(vocab_size),
        processes=settings.deployment.training_processes,
        estimate=_estimate(settings, vocab_size, *size) if size else None,
    )


def _estimate(settings: Settings, vocab_size: int, tokens: int, documents: int, basis: str) -> Estimate:
    experiment = settings.experiment
    pretraining, split, pairing = experiment.pretraining, experiment.corpus.split, experiment.pairing
    seeds = len(pretraining.seeds)
    steps = budget_steps(tokens, pretraining.repetitions, pretraining.tokens_per_step)
    budget = steps * pretraining.tokens_per_step
    synthetic = min(round(pretraining.synthetic_share * pretraining.repetitions * tokens), budget)
    oracle = round(tokens * split.oracle / split.unique)
    # The oracle arm reads D and its own split as one corpus.
    oracle_d = round(budget * tokens / (tokens + oracle))
    arms = {
        "baseline": {"unique": budget},
        "sbp": {"unique": budget - synthetic, "synthetic": synthetic},
        "oracle": {"unique": oracle_d, "oracle": budget - oracle_d},
    }
    held = {"unique": tokens, "synthetic": synthetic, "oracle": oracle}
    epochs = {
        arm: {source: read / held[source] if held[source] else 0.0 for source, read in sources.items()}
        for arm, sources in arms.items()
    }

    mean = tokens / documents
    cut = min(mean, experiment.max_document_tokens)
    # At most: every document has its full number of pairs.
    neighbors = pairing.neighbors * (1 + pairing.both_directions)
    pairs = documents * min(pairing.max_pairs_per_document or neighbors, neighbors)
    examples = pairs * (1 if experiment.synthesizer.earlier_round is None else 2)
    tuning = examples * (2 * cut + 3) * experiment.synthesizer.epochs
    # Every synthetic document is taken to be as long as a real one; its prompt is read once more.
    rollouts = synthetic / max(cut, 1)
    generation = synthetic + rollouts * (cut + 2)
    per_token = experiment.model.flops_per_token(vocab_size)
    known = EMBEDDING_MODELS.get(pairing.embedding_model, next(iter(EMBEDDING_MODELS.values())))
    embedded = documents * min(mean, pairing.max_tokens)
    work = [
        # 2 FLOPs per parameter and token forward; training is 3 forwards (Kaplan et al., 2020, section 2.1).
        _work("embedding", embedded, 2 * known[0] * embedded, EMBEDDING_MFU),
        *(_work(f"{arm} × {seeds}" if seeds > 1 else arm, budget * seeds, per_token * budget * seeds, TRAINING_MFU)
          for arm in arms),
        _work("synthesizer-tuning (at most)", tuning, per_token * tuning, TRAINING_MFU),
        _work("generation", generation, per_token / 3 * generation, GENERATION_MFU),
    ]  # fmt: skip

    real = tokens * (1 + (split.oracle + split.heldout) / split.unique)
    real_documents = documents * (1 + (split.oracle + split.heldout) / split.unique)
    token_bytes = 2 if vocab_size <= 2**16 else 4
    model = experiment.model.parameters(vocab_size) * 4  # float32
    text = BYTES_PER_TOKEN * TEXT_COMPRESSION
    sizes = {
        "corpus/raw_documents (at least)": real * text,
        "corpus/minhash_signatures": real_documents * (8 * experiment.corpus.dedup.bands + 64),
        "corpus/documents": real * text,
        "corpus/tokens": real * token_bytes,
        "pairing/embeddings": documents * known[1] * 4,
        "pairing/ann_index": documents * (known[1] * (1 + 4) + 4 * pairing.nprobe),
        "pairing/partial_candidates (at most)": partial_rows(settings, documents) * ROW_BYTES,
        "pairing/neighbor_candidates": documents * pairing.neighbors * ROW_BYTES,
        "pairing/neighbor_edges (at most)": pairs * ROW_BYTES,
        "pairing/neighbor_pairs (at most)": pairs * ROW_BYTES,
        "synthesizer/tuning_examples (at most)": examples * (2 * cut + 3) * token_bytes,
        "synthesis/synthetic_documents": synthetic * text,
        "synthesis/synthetic_tokens": synthetic * token_bytes,
        "models (arms and synthesizer)": model * (3 * seeds + 1),
    }
    stages = pairing_stages(settings, documents, known[1], documents * mean * text)
    advice = block_advice(settings, stages)
    return Estimate(basis, tokens, documents, steps, budget, arms, epochs, work, sizes, stages, advice)


def _work(name: str, tokens: float, flops: float, mfu: float) -> Work:
    return Work(name, tokens, flops, flops / (GPU_FLOPS * mfu) / 3600, flops / CPU_FLOPS)


def render(plan: Plan) -> str:
    """Return the plan as plain text for a terminal."""
    lines = [
        f"profile {plan.profile}: {plan.shards:,} shards, {plan.seeds} training seed{'s' * (plan.seeds != 1)}",
        f"model: {_si(plan.parameters)} parameters ({plan.parameters:,}) with a vocabulary of {plan.vocab_size:,}; "
        f"{_si(plan.flops_per_token, 'FLOP')} per training token",
        "",
        f"{'asset':<36}{'partitions':>12}",
        *(f"{name:<36}{count:>12,}" for name, count in plan.assets.items()),
        f"{'in all':<36}{sum(plan.assets.values()):>12,}",
        "",
    ]
    estimate = plan.estimate
    if estimate is None:
        lines.append("cost: unknown, because nothing says how large D is; set corpus.expected_unique_tokens")
        return "\n".join(lines)
    lines += [
        f"D: {_si(estimate.unique_tokens)} tokens in {_si(estimate.unique_documents)} documents "
        f"(from {estimate.basis}; duplicates make it smaller)",
        f"every arm reads {estimate.budget:,} tokens in {estimate.steps:,} steps:",
    ]
    for arm, sources in estimate.arms.items():
        read = ", ".join(f"{s} {_si(n)} ({estimate.epochs[arm][s]:.2f} epochs)" for s, n in sources.items())
        lines.append(f"  {arm:<10}{read}")
    charged = sum(work.flops for work in estimate.work if work.name.startswith(("synthesizer", "generation")))
    equal = estimate.budget + charged / plan.flops_per_token
    lines.append(
        f"SBP with tuning and generation charged costs as much as a baseline of {_si(equal)} tokens "
        f"({equal / estimate.unique_tokens:.1f} epochs)"
    )
    small = plan.parameters <= CPU_PARAMETERS
    header = f"\n{'work':<32}{'tokens':>10}{'FLOPs':>12}{'GPU hours':>14}"
    lines.append(header + (f"{'CPU seconds':>14}" if small else ""))
    for work in estimate.work:
        row = f"{work.name:<32}{_si(work.tokens):>10}{work.flops:>12.2e}{work.gpu_hours:>14,.2f}"
        lines.append(row + (f"{work.cpu_seconds:>14,.0f}" if small else ""))
    total = sum(work.gpu_hours for work in estimate.work)
    row = f"{'in all':<32}{'':>10}{sum(work.flops for work in estimate.work):>12.2e}{total:>14,.2f}"
    lines.append(row + (f"{sum(work.cpu_seconds for work in estimate.work):>14,.0f}" if small else ""))
    lines.append(
        f"GPU hours assume {GPU_FLOPS / 1e12:.0f} TFLOP/s ({GPU_NAME}, dense bfloat16) "
        f"at {TRAINING_MFU:.0%} utilisation in training, {EMBEDDING_MFU:.0%} embedding and "
        f"{GENERATION_MFU:.0%} generating."
    )
    if small:
        lines.append(f"CPU seconds assume {CPU_FLOPS:.0e} FLOP/s in one process, start-up of engines not counted.")
    lines += ["", f"{'artifact':<40}{'bytes':>10}"]
    lines += [f"{name:<40}{_si(size, 'B'):>10}" for name, size in estimate.bytes.items()]
    lines.append(f"{'in all':<40}{_si(sum(estimate.bytes.values()), 'B'):>10}")
    return "\n".join([*lines, *_render_pairing(estimate)])


def _render_pairing(estimate: Estimate) -> list[str]:
    """Return the lines of what pairing takes on a cluster; none where it takes less than an hour of one core."""
    stages, moved = estimate.pairing, sum(stage.moved for stage in estimate.pairing)
    if (hours := sum(stage.core_hours for stage in stages)) < 1:
        return []
    heads = f"{'tasks':>8}{'memory each':>13}{'hours each':>12}{'core-hours':>12}{'bytes moved':>13}"
    return [
        "",
        f"{'pairing after embedding':<24}{heads}",
        *(
            f"{stage.name:<24}{stage.tasks:>8,}{_si(stage.memory, 'B'):>13}"
            f"{stage.core_hours / stage.tasks:>12,.2f}{stage.core_hours:>12,.1f}{_si(stage.moved, 'B'):>13}"
            for stage in stages
        ),
        f"{'in all':<24}{'':>33}{hours:>12,.1f}{_si(moved, 'B'):>13}",
        "Hours are of one core with AVX-512; every document is taken to have all its neighbours above the threshold.",
        "Nodes of a cluster take the search; the rest are steps of Dagster runs (docs/cluster.md).",
        *([estimate.block_too_large] if estimate.block_too_large else []),
    ]


def _si(value: float, unit: str = "") -> str:
    """Return three digits, a decimal prefix and the unit: 8.4 M, 80, 3.2 kB."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    for prefix in prefixes:
        if abs(value) < 999.5 or prefix == prefixes[-1]:
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}".rstrip()
