"""What a pilot's figures say, judged by what is known of corpora on which SBP helped, did nothing, or did harm.

Each criterion has two bounds: on one side SBP has helped where everything else was right, on the other it has not, and
between them nothing is known. They are few and come from small models (docs/pilot.md lists them), so a verdict says
where to look, and not what a run will measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Figures = dict[str, Any]


class Judgement(StrEnum):
    """Of one criterion, or of all together."""

    GOOD = "good"
    UNKNOWN = "unknown"
    BAD = "bad"


WORTH_IT, NOT_WORTH_IT, NOT_KNOWN = "worth it", "not worth it here", "not known"


@dataclass(frozen=True)
class Criterion:
    """What is asked of a corpus: at `good` or beyond SBP has helped, at `bad` or beyond it has not."""

    name: str
    bad: float
    good: float
    evidence: str

    def judge(self, value: float) -> Judgement:
        """Return on which side of the bounds a value is."""
        sign = 1 if self.good > self.bad else -1
        if sign * value >= sign * self.good:
            return Judgement.GOOD
        return Judgement.BAD if sign * value <= sign * self.bad else Judgement.UNKNOWN


SIMILARITY = Criterion(
    "random pairs above the threshold", 0.1, 0.01,
    "0.3% in the world of concepts, where SBP helps; nearly all in five_tokens, where nothing can help",
)  # fmt: skip
PAIRED = Criterion(
    "documents with a pair", 0.45, 0.9,
    "97% in the world of concepts, where SBP helps; 39% of a sample of documentation, on which it did harm",
)  # fmt: skip
COPYING = Criterion(
    "rare words of d2 that d1 has", 0.05, 0.9,
    "98% in the world of concepts, where synthesizers learn to copy; where two thirds of the facts were shared, they "
    "did less well or not at all. In documentation 10%, and 5% of nearest neighbours whatever their similarity. What "
    "larger models and paraphrase need is not known",
)  # fmt: skip
READINGS = Criterion(
    "readings of D", 4, 12,
    "up to four are nearly as good as new text (Muennighoff et al., arXiv 2305.16264); SBP helped at 12",
)  # fmt: skip
TUNING = Criterion(
    "tokens that the synthesizer is tuned on", 0.5e6, 1.2e6,
    "where 0.7M parameters began to copy names and values to documents on which they had not been tuned",
)  # fmt: skip
SUBJECT = Criterion(
    "synthetic documents that keep their subject", 0.61, 0.9,
    "95% where SBP helped; 61% where the synthesizer recalled D and SBP was no better than a placebo",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A criterion's value in a sample, what it is judged to be, and what would change it."""

    criterion: Criterion
    value: float | None  # None: it does not exist in this corpus
    judgement: Judgement
    shown: str
    because: str
    change: str = ""


@dataclass(frozen=True)
class Verdict:
    """The findings of a pilot and their sum: worth it where all are good, not where one is bad, else not known."""

    verdict: str
    findings: list[Finding]

    @property
    def lines(self) -> list[str]:
        """Return the verdict in sentences."""
        bad, unknown = (
            [finding for finding in self.findings if finding.judgement is kind]
            for kind in (Judgement.BAD, Judgement.UNKNOWN)
        )
        if self.verdict == WORTH_IT:
            return ["Worth it, as far as a pilot can tell: run it with the placebos, which decide."]
        reasons = bad or unknown
        head = "Not worth it here, because " if bad else "Not known: between what has helped and what has not, because "
        lines = [head + "; ".join(finding.because for finding in reasons) + "."]
        if final := [finding.change for finding in bad if finding.value is None and finding.change]:
            return [*lines, *(f"Change {change}." for change in final)]
        lines += [f"Change: {finding.change}." for finding in reasons if finding.change]
        if bad and unknown:
            lines.append(f"Not known either: {', '.join(finding.criterion.name for finding in unknown)}.")
        return lines


def judge(figures: Figures) -> Verdict:
    """Return the verdict on the `figures` of `pilot.figures`, whose part `tuning` may be missing."""
    findings = list(_findings(figures))
    judged = {finding.judgement for finding in findings}
    if Judgement.BAD in judged:
        return Verdict(NOT_WORTH_IT, findings)
    return Verdict(NOT_KNOWN if Judgement.UNKNOWN in judged else WORTH_IT, findings)


def _findings(figures: Figures) -> Iterator[Finding]:
    pairs, budget = figures["pairs"], figures["budget"]
    documents = figures["documents"]
    above = pairs["random_pairs_above"]
    yield Finding(
        SIMILARITY, above, SIMILARITY.judge(above), f"{above:.1%}",
        f"{above:.1%} of random pairs of documents are as similar as pairs have to be, so that a pair says little",
        _threshold_advice(pairs),
    )  # fmt: skip
    yield _paired(pairs, documents, budget["readings"])
    yield _copying(pairs)
    readings = budget["readings"]
    yield Finding(
        READINGS, readings, READINGS.judge(readings), f"{readings:g}",
        f"D is read {readings:g} times, and new documents have little to add to a corpus that is read so few times",
        "a larger budget (pretraining.repetitions), or a smaller D where the pairs allow it; where the budget is what "
        "it is, more real text is better than synthetic text",
    )  # fmt: skip
    tokens = budget["tuning_tokens"]
    yield Finding(
        TUNING, tokens, TUNING.judge(tokens), f"{tokens:,}",
        f"the synthesizer is tuned on {tokens:,} tokens, with which it hardly learns to copy from its seed",
        "more pairs (a larger D, pairing.max_pairs_per_document) or more synthesizer.epochs",
    )  # fmt: skip
    if tuning := figures.get("tuning"):
        kept = tuning["subject"]["kept"]
        yield Finding(
            SUBJECT, kept, SUBJECT.judge(kept), f"{kept:.0%}",
            f"{kept:.0%} of the synthetic documents are about the subject of their seed",
            "a D with more pairs, a higher pretraining.weight_decay, or synthesizer.start early_stopped, so that the "
            "synthesizer copies what it cannot recall",
        )  # fmt: skip


def _paired(pairs: Figures, documents: Figures, readings: float) -> Finding:
    share, count = pairs["paired_share"], documents["measured"]
    judgement = PAIRED.judge(share)
    because = f"only {share:.0%} of {count:,} documents have a pair ({pairs['pairs_per_document']:.1f} per document)"
    if judgement is Judgement.BAD and (documents["d"] or count) > count:
        # A document of a larger D has nearer neighbours.
        judgement = Judgement.UNKNOWN
        because += f", in a sample; of the {documents['d']:,} of D more have"
    sizes = [size for size in pairs["sizes"] if size["documents"] > count and size["paired_share"] > share + 0.02]
    advice = []
    if sizes:
        best = sizes[-1]
        advice.append(
            f"a larger D: of {best['documents']:,} documents {best['paired_share']:.0%} have a pair "
            f"({best['pairs_per_document']:.1f} per document), and at the same budget each is read "
            f"{readings * count / best['documents']:.1f} times"
        )
    if lower := _threshold_advice(pairs):
        advice.append(lower)
    return Finding(PAIRED, share, judgement, f"{share:.0%}", because, "; or ".join(advice))


def _threshold_advice(pairs: Figures) -> str:
    """Return the threshold at which most documents have a pair, if pairs are still told from random ones there."""
    fit = [
        row
        for row in pairs["thresholds"]
        if SIMILARITY.judge(row["random_pairs_above"]) is Judgement.GOOD
        and row["paired_share"] > pairs["paired_share"] + 0.02
        and (row["rare_words_in_d1"] or 0) >= 2 * (row["rare_words_in_random"] or 0)
    ]
    if SIMILARITY.judge(pairs["random_pairs_above"]) is not Judgement.GOOD:
        fit = [
            row
            for row in pairs["thresholds"]
            if SIMILARITY.judge(row["random_pairs_above"]) is Judgement.GOOD and row["pairs"]
        ]
    if not fit:
        return ""
    # The highest that pairs enough documents, else the one that pairs most.
    enough = [row for row in fit if PAIRED.judge(row["paired_share"]) is Judgement.GOOD]
    row = (
        max(enough, key=lambda row: row["min_similarity"]) if enough else max(fit, key=lambda row: row["paired_share"])
    )
    copied = "" if row["rare_words_in_d1"] is None else f", and d1 has {row['rare_words_in_d1']:.0%} of d2's rare words"
    return (
        f"pairing.min_similarity {row['min_similarity']:g}, at which {row['paired_share']:.0%} of the documents have a "
        f"pair ({row['pairs_per_document']:.1f} per document){copied}"
    )


def _copying(pairs: Figures) -> Finding:
    share, random = pairs["rare_words_in_d1"], pairs["rare_words_in_random"]
    if share is None:
        if not pairs["pairs"]:
            return Finding(COPYING, 0.0, Judgement.BAD, "no pair", "there is no pair of documents")
        return Finding(
            COPYING, None, Judgement.BAD, "none", "no document has a rare word, so that d1 says nothing of d2",
            "the corpus: here no document says anything of another one, and no setting makes it",
        )  # fmt: skip
    judgement = COPYING.judge(share)
    because = f"d1 has {share:.0%} of d2's rare words (a random document {random:.1%})"
    if share < 2 * random:
        judgement = Judgement.BAD
        because += ", hardly more than any other document"
    else:
        because += ", and what it lacks cannot be copied from it"
    return Finding(
        COPYING, share, judgement, f"{share:.0%}", because,
        "pairs of documents that say the same things: a higher pairing.min_similarity, shorter documents "
        "(corpus.max_chars), or pairing.centring where a template decides what is similar",
    )  # fmt: skip
