"""The five-token world as a negative control: no arm may go below the entropy, and SBP may gain nothing.

Held-out letters are independent of all that a model has read, so whatever probabilities q it gives them, q / p for the
true p multiplies to a martingale of mean at most 1: over n tokens a model's total loss is below that of p by more
than ln(1 / a) with a probability of at most a (Markov's inequality; of any model, near p or far from it). This
is the sampling error that arms are allowed below the floor; it needs no estimate of a variance.

Any arm can be *above* the floor. The baseline is, as it memorises its repeated documents, and SBP and the oracle
beat that: they repeat less. It is no knowledge about documents, and early stopping has as much. So what SBP gains is
its lowest held-out loss along training below the baseline's lowest. Near uniform predictions the variance of the loss
is twice its excess e over the entropy (both are second moments of q / p - 1, up to third order), so the standard error
of a difference is at most (sqrt(2 e_baseline) + sqrt(2 e_SBP)) / sqrt(n).

Scores are held against their floor alone. They leave out the documents' ends, so a model that expects too few of them
scores its letters the better for it, and a difference of two scores can be real without any knowledge; the losses along
training count the ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from sbp_assets.corpus.five_tokens import LETTERS, surprisal
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.settings import FiveTokensSource

FALSE_ALARMS = 1e-3  # Probability that chance alone puts any of a run's losses below its floor by more than is allowed.
STANDARD_ERRORS = 4


@dataclass(frozen=True)
class Floor:
    """What the true distribution scores on some held-out tokens: their number, and its mean loss in nats per token."""

    tokens: int
    nats: float

    def allowed(self, losses: int) -> float:
        """Return the nats per token by which chance may put the lowest of `losses` losses below it (Bonferroni)."""
        return math.log(losses / FALSE_ALARMS) / self.tokens


def scored_floor(texts: Iterable[str]) -> Floor:
    """Return the floor of the scores: ln 5 for each letter of the held-out documents; their ends are not scored."""
    return Floor(sum(len(text.split()) for text in texts), math.log(len(LETTERS)))


def measured_floor(source: FiveTokensSource, lengths: Iterable[int], max_tokens: int) -> Floor:
    """Return the floor of the losses along training: letters and `<eos>` in the first `max_tokens` labels.

    `lengths` are the tokens of the held-out documents, `<bos>` and `<eos>` included, in the order in which training
    reads them (`training.rows.heldout_rows`). Raises ValueError when no token was measured.
    """
    tokens, nats, left = 0, 0.0, max_tokens + 1
    for length in lengths:
        held = min(length, left)
        if held < 2:
            break
        nats += surprisal(source, min(held, length - 1) - 1, ended=held == length)
        tokens += held - 1
        left -= held
    if not tokens:
        raise ValueError("no held-out tokens were measured: raise pretraining.heldout_tokens or corpus.split.heldout")
    return Floor(tokens, nats / tokens)


@dataclass(frozen=True)
class Verdict:
    """Problems (empty where the control stayed negative), and the numbers they were judged by, in nats per token."""

    problems: list[str]
    numbers: dict[str, float]


def judge(comparison: pl.DataFrame, dynamics: pl.DataFrame, scored: Floor, measured: Floor) -> Verdict:
    """Return the verdict on a run's comparison and training dynamics, given the floors of the same tokens.

    A mean loss over seeds obeys the same bound: it is at least the loss of the seeds' averaged probabilities.
    """
    rows = comparison.filter(pl.col("task") == "heldout", pl.col("metric") == "nats_per_token")
    finals = {
        arm if arm != "baseline" or row["against"] == "final" else "early stopped": row[arm]
        for row in rows.iter_rows(named=True)
        for arm in ARMS
    }
    curves = dynamics.group_by("arm", "tokens").agg(pl.col("heldout_loss").mean())
    lowest = dict(curves.group_by("arm").agg(pl.col("heldout_loss").min()).iter_rows())
    if missing := [arm for arm in ARMS if finals.get(arm) is None or lowest.get(arm) is None]:
        return Verdict([f"no held-out loss of {', '.join(missing)}"], {})
    # The early-stopped baseline was chosen among its measurements, seed by seed: any choice of one per seed counts.
    choices = math.prod(dynamics.filter(pl.col("arm") == "baseline").group_by("seed").len()["len"])
    slack = {"scored": scored.allowed(len(ARMS) + choices), "along training": measured.allowed(len(curves))}
    problems = [
        f"{name}, {where}: {loss:.5f} nats per token, below the entropy {floor.nats:.5f} by more than the "
        f"{slack[where]:.5f} that chance explains on {floor.tokens:,} tokens"
        for where, floor, losses in (("scored", scored, finals), ("along training", measured, lowest))
        for name, loss in losses.items()
        # Not `<`: a loss that is no number must not pass.
        if not loss >= floor.nats - slack[where]
    ]
    gain = lowest["baseline"] - lowest["sbp"]
    # An excess below the slack cannot be told from none.
    excess = [max(lowest[arm] - measured.nats, slack["along training"]) for arm in ("baseline", "sbp")]
    error = sum(math.sqrt(2 * e) for e in excess) / math.sqrt(measured.tokens)
    if not gain <= STANDARD_ERRORS * error:
        problems.append(
            f"SBP's lowest loss along training is {gain:.5f} nats per token below the baseline's, {gain / error:.1f} "
            f"standard errors: it gained where nothing can be learned"
        )
    numbers = {"sbp_gain": gain, "sbp_gain_stderr": error}
    for where, floor, losses in (("scored", scored, finals), ("lowest_along_training", measured, lowest)):
        allowed = slack["scored" if floor is scored else "along training"]
        numbers |= {f"{where}_entropy": floor.nats, f"{where}_tokens": floor.tokens, f"{where}_allowed": allowed}
        numbers |= {f"{where}_excess_of_{name.replace(' ', '_')}": loss - floor.nats for name, loss in losses.items()}
    return Verdict(problems, numbers)
