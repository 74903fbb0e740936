"""The figures and the verdict of a pilot as a short table, and as JSON."""

from __future__ import annotations

from typing import Any

from sbp_assets.pilot.verdict import Figures, Verdict


def as_json(figures: Figures, verdict: Verdict) -> dict[str, Any]:
    """Return all that is known of a pilot, for `json.dumps`."""
    return {
        "verdict": verdict.verdict,
        "lines": verdict.lines,
        "criteria": [
            {
                "name": finding.criterion.name, "value": finding.value, "judgement": finding.judgement.value,
                "bad": finding.criterion.bad, "good": finding.criterion.good, "evidence": finding.criterion.evidence,
                "change": finding.change,
            }
            for finding in verdict.findings
        ],
        **figures,
    }  # fmt: skip


def render(figures: Figures, verdict: Verdict) -> str:
    """Return the criteria with their bounds, pairs by threshold and by size, and the verdict, as plain text."""
    documents, pairs, budget = figures["documents"], figures["pairs"], figures["budget"]
    of = "all" if documents["whole_corpus"] else "the first"
    expected = "unknown" if documents["d"] is None else f"{documents['d']:,}"
    lines = [
        f"Sample: {documents['sample']:,} documents, of {of} {documents['read']:,} that were read. "
        f"D: {expected} documents, {budget['tokens_of_d']:,} tokens, read {budget['readings']:g} times (in SBP "
        f"{budget['readings_in_sbp']:g}); measured on {documents['measured']:,}.",
        "",
        f"{'':<46}{'here':>10}{'helped at':>12}{'not at':>10}  judged",
    ]
    for finding in verdict.findings:
        criterion = finding.criterion
        good, bad = (_bound(criterion.good), _bound(criterion.bad))
        lines.append(f"{criterion.name:<46}{finding.shown:>10}{good:>12}{bad:>10}  {finding.judgement}")
    lines += ["", *_details(figures), "", f"{'threshold':<12}{'pairs/document':>16}{'with a pair':>13}"
              f"{'rare words in d1':>18}{'in a random one':>17}{'random pairs above':>20}"]  # fmt: skip
    set_to = pairs["min_similarity"]
    shown = [row for row in pairs["thresholds"] if row["pairs"] and row["min_similarity"] != set_to]
    for row in sorted([*shown, {**pairs, "configured": True}], key=lambda row: row["min_similarity"]):
        mark = f"{row['min_similarity']:.2f}" + (" (set)" if "configured" in row else "")
        lines.append(
            f"{mark:<12}{row['pairs_per_document']:>16.2f}{row['paired_share']:>13.0%}{_share(row['rare_words_in_d1']):>18}"
            f"{_share(row['rare_words_in_random']):>17}{row['random_pairs_above']:>20.1%}"
        )
    lines += ["", f"{'documents':<12}{'pairs/document':>16}{'with a pair':>13}"]
    for size in pairs["sizes"]:
        lines.append(f"{size['documents']:<12,}{size['pairs_per_document']:>16.2f}{size['paired_share']:>13.0%}")
    return "\n".join([*lines, "", *verdict.lines])


def _details(figures: Figures) -> list[str]:
    pairs, lines = figures["pairs"], []
    if truth := pairs.get("truth"):
        lines.append(
            f"Exactly: d1 states {truth['facts_in_d1']:.1%} of d2's facts (a random document "
            f"{pairs['truth_of_random']['facts_in_d1']:.1%}); {truth['one_concept']:.1%} of the pairs are about one "
            f"concept, and {truth['crossing']:.0%} of these cross views."
        )
    if not (tuning := figures.get("tuning")):
        return [*lines, "What the synthesizer writes is not known: --tune tunes one on the sample."]
    baseline, subject = tuning["baseline"], tuning["subject"]
    until_best = baseline["best_heldout_tokens"] / baseline["tokens"]
    lines += [
        f"Synthesizer: {tuning['synthetic_documents']:,} documents; cosine to the seed {subject['to_seed']:.2f}, to a "
        f"random document {subject['to_random']:.2f}; the seed has {_share(tuning['rare_words_in_seed'])} of their "
        f"rare words, a random document {_share(tuning['rare_words_in_random'])}.",
        f"Baseline: held-out loss {baseline['heldout_loss']:.3f} at the end, {baseline['best_heldout_loss']:.3f} at "
        f"its lowest (at {until_best:.0%} of its tokens); what it loses after that, early stopping saves without SBP.",
    ]
    if truth := tuning.get("truth"):
        lines.append(
            f"Exactly: {truth['subject_kept']:.1%} of the synthetic documents are about their seed's concept, and "
            f"{truth['statements_right']:.1%} of what they state is right."
        )
    return lines


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _bound(value: float) -> str:
    if value <= 1:
        return f"{value:.0%}"
    return f"{value / 1e6:g}M" if value >= 1e5 else f"{value:g}"
