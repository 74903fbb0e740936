"""The five-token world: documents without any relation, so that there is nothing for SBP to learn.

It is the negative control of the Bayesian reading (paper, section 5): a document is letters drawn uniformly and
independently from {A, B, C, D, E}, so no document says anything about another, and no model reaches a loss below ln 5
nats per letter in expectation. Each letter is a word, which the byte-level BPE never merges: each is one token.

A document ends after each letter with one fixed probability, as if a sixth symbol were drawn, but not before
MIN_LETTERS: of that length, no two documents are the same by chance and de-duplication drops none. A fixed length could
be learned, and would show in the held-out loss as a gain. Everything is a pure function of the settings and the
document's number, independent of the number of shards.
"""

from __future__ import annotations

import math
import random

from sbp_assets.settings import FiveTokensSource

LETTERS = "ABCDE"
MIN_LETTERS = 8


def end_probability(source: FiveTokensSource) -> float:
    """Return the probability that a document of MIN_LETTERS or more ends here; tokens_per_document is the mean."""
    return 1 / (source.tokens_per_document - MIN_LETTERS + 1)


def document(source: FiveTokensSource, number: int) -> dict[str, str]:
    """Return document `number` (from 0): id, text, url, source; a pure function of the settings and the number."""
    rng, end = random.Random(f"five-tokens-{source.seed}-{number}"), end_probability(source)
    letters: list[str] = []
    while len(letters) < MIN_LETTERS or rng.random() >= end:
        letters.append(LETTERS[int(rng.random() * len(LETTERS))])
    return {
        "id": f"five-tokens-{number:07d}", "text": " ".join(letters), "url": f"five-tokens://{number}",
        "source": "five_tokens",
    }  # fmt: skip


def surprisal(source: FiveTokensSource, letters: int, ended: bool = True) -> float:
    """Return -log of the true probability of a document of so many letters, in nats; its end counts where `ended`.

    It is the least that any model can score in expectation, predicting letters and end from `<bos>` on.
    """
    end = end_probability(source)
    continued = letters * math.log(len(LETTERS)) - max(0, letters - MIN_LETTERS) * math.log1p(-end)
    return continued - math.log(end) if ended else continued
