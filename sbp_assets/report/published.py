"""The results that the paper publishes, which the page shows beside those of this run."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "Yang, Zhang, Liu, Hashimoto, Candès, Wang and Pang, Synthetic Bootstrapped Pretraining, arXiv 2509.15248"


class Scale(NamedTuple):
    """Results at one number of training tokens: the baseline's score, and the differences to it of the other arms."""

    baseline: float
    delta_sbp: float
    delta_oracle: float


class Result(NamedTuple):
    """One row of the paper's main table; accuracies and their differences are in percent."""

    name: str
    higher_is_better: bool
    tokens_200b: Scale
    tokens_1t: Scale


class Quality(NamedTuple):
    """Share of documents in percent: synthetic ones at each scale, and real ones (None where the paper has none).

    The first two scales are of the 3B model, the third of the 6B one.
    """

    tokens_200b: float
    tokens_1t: float
    tokens_1t_6b: float
    real: float | None


# Of the 3B model (SOURCE, main table).
RESULTS = (
    Result("OpenWebText2 perplexity", False, Scale(5.74, -0.53, -1.02), Scale(4.51, -0.02, -0.12)),
    Result("LAMBADA perplexity", False, Scale(6.87, -0.85, -1.86), Scale(4.33, -0.03, -0.22)),
    Result("MMLU perplexity, five-shot", False, Scale(3.83, -0.36, -0.51), Scale(3.17, -0.06, -0.05)),
    Result("ARC-Challenge", True, Scale(35.32, 1.28, 2.82), Scale(42.66, 1.62, 3.84)),
    Result("ARC-Easy", True, Scale(68.94, 2.65, 4.29), Scale(75.63, 0.42, 2.11)),
    Result("SciQ", True, Scale(90.50, 1.00, 2.40), Scale(93.20, 0.80, 0.50)),
    Result("Winogrande", True, Scale(60.14, 1.90, 5.53), Scale(65.19, 1.42, 2.92)),
    Result("TriviaQA, one-shot", True, Scale(22.51, 3.36, 7.37), Scale(36.07, 0.25, 0.59)),
    Result("WebQS, one-shot", True, Scale(8.56, 3.74, 10.83), Scale(19.34, 0.54, 0.44)),
    Result("Average QA accuracy", True, Scale(47.66, 2.32, 5.54), Scale(55.35, 0.84, 1.73)),
)
# Of the 6B model at 1T tokens: the last row of RESULTS.
AVERAGE_QA_6B = Scale(58.29, 1.32, 2.26)
# The six tasks whose mean accuracy is the last row of RESULTS.
QA_TASKS = ("arc_challenge", "arc_easy", "sciq", "winogrande", "triviaqa", "webqs")
# Quality of the synthetic documents (SOURCE), by metric of synthesis/quality_table.
QUALITY = {
    "repetition": Quality(4.3, 3.9, 2.6, 1.8),
    "duplicates": Quality(0.8, 0.8, 0.3, 0.7),
    "non_factual": Quality(15.1, 8.7, 6.5, 1.8),
    "pair_irrelevance": Quality(25.6, 7.8, 6.0, None),
    "pair_copying": Quality(0.1, 0.9, 0.3, None),
}
