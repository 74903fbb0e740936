"""Related real documents in one document, in the place of synthetic ones (in-context pretraining, arXiv 2310.10638).

A control: it has the relations between documents that SBP learns from, and no synthesizer. Its documents are the
examples that the synthesizer is tuned on, d1, an empty line and d2, cut where those are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from sbp_assets.corpus.tokenizer import decode, encode_documents
from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.generate import DOCUMENT_SCHEMA, SynthesisError, sampling_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_ENGINE = "none"  # Of a row that no engine has sampled.
SEPARATOR = "\n\n"
SEPARATOR_TOKENS = 2  # At most: one for each newline.
BATCH = 512  # Documents that are encoded at a time.


def pair_order(partners: Mapping[str, Sequence[int]], salt: str) -> Iterator[tuple[str, int, int]]:
    """Yield (d1, rollout, partner) without end: in each round one pair of every d1, in order of id, that has one left.

    A partner is drawn by the row's sampling seed from those of its d1 that are left, so that another `salt` takes the
    pairs in another order. When all pairs have had their turn, they begin again. Rollouts count the rounds.
    """
    width = max(map(len, partners.values()), default=0)
    for first in count(0, width) if width else ():
        left = {d1: list(partners[d1]) for d1 in sorted(partners)}
        for rollout in range(first, first + width):
            for d1, own in left.items():
                if own:
                    yield d1, rollout, own.pop(sampling_seed(salt, d1, rollout) % len(own))


def concatenated_pairs(
    examples: Path,
    seeds: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    budget: int,
    salt: str,
    context_length: int,
    version: str,
    progress: Progress,
) -> tuple[pl.DataFrame, int]:
    """Return the rows (DOCUMENT_COLUMNS) of pairs whose d1 is one of `seeds`, and the number of those pairs.

    The rows are the shortest prefix of `pair_order` whose tokens reach `budget`. `examples` is the directory of
    synthesizer/tuning_examples, of content `version`. d2 is cut once more where the empty line would not fit into
    `context_length`; finish_reason is "length" where d2 was cut. `progress` counts tokens.

    Raises SynthesisError for a budget without pairs.
    """
    table = scan_table(examples / "documents.parquet").with_row_index("place")
    own = table.filter(pl.col("d1").is_in(list(seeds))).select("place", "d1", "prompt_tokens", "cut").collect()
    if budget > 0 and own.is_empty():
        raise SynthesisError(
            f"a budget of {budget} tokens and no neighbour pair of the shard's {len(seeds)} seed documents: lower "
            "pairing.min_similarity, raise pairing.neighbors, or divide the corpus into fewer corpus.shards"
        )
    tokens, offsets = (
        np.load(examples / name, mmap_mode="r", allow_pickle=False) for name in ("tokens.npy", "offsets.npy")
    )
    partners: dict[str, list[int]] = {}
    details: dict[int, tuple[int, bool]] = {}
    for place, d1, prompt, cut in own.iter_rows():
        partners.setdefault(d1, []).append(place)
        details[place] = prompt, cut

    def joined(place: int) -> tuple[str, bool]:
        example = tokens[offsets[place] : offsets[place + 1]]
        prompt, cut = details[place]
        d1, d2 = example[1 : prompt - 1], example[prompt : len(example) - (0 if cut else 1)]
        room = context_length - 2 - len(d1) - SEPARATOR_TOKENS
        return decode(tokenizer, d1) + SEPARATOR + decode(tokenizer, d2[:room]), cut or len(d2) > room

    order, rows, reached = pair_order(partners, salt), [], 0
    while reached < budget:
        batch = list(islice(order, BATCH))
        texts = [joined(place) for _, _, place in batch]
        encoded = encode_documents(tokenizer, [text for text, _ in texts])
        for (d1, rollout, _), (text, cut), ids in zip(batch, texts, encoded, strict=True):
            reason = "length" if cut else "stop"
            seed = sampling_seed(salt, d1, rollout)
            rows.append((f"syn-{d1}-{rollout}", d1, rollout, seed, text, len(ids), reason, version, NO_ENGINE))
            reached += len(ids)
            progress.advance(len(ids))
            if reached >= budget:
                break
    return pl.DataFrame(rows, schema=DOCUMENT_SCHEMA, orient="row"), len(own)
