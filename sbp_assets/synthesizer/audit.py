"""What must hold of the tuning examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import HELDOUT, TRAIN, format_example, heldout_seeds, locations


def check_examples(
    arrays: TokenArrays, pairs: int, unique_ids: pl.Series, context_length: int, related_id: int, eos_id: int
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples that break a rule, by rule; empty where all hold.

    The rules: as many examples as `pairs`, no example twice, within the context, prompt_tokens points just behind
    `<related>` with d2 to follow, `<eos>` at the end exactly where d2 was not cut, d1 and d2 in D.
    """
    documents, lengths = arrays.documents, arrays.lengths
    prompt = documents["prompt_tokens"].to_numpy()
    inside = (prompt >= 2) & (prompt < lengths)
    starts = arrays.offsets[:-1]
    last_of_prompt = arrays.tokens[np.where(inside, starts + prompt - 1, starts)]
    ends = np.asarray(arrays.tokens[arrays.offsets[1:] - 1]) == eos_id
    known = unique_ids.implode()
    in_corpus = documents.select(pl.col("d1").is_in(known) & pl.col("d2").is_in(known)).to_series()
    broken = {
        "prompt_tokens": ~inside | (last_of_prompt != related_id),
        "longer than the context": lengths > context_length,
        "eos": ends == documents["cut"].to_numpy(),
        "not in D": ~in_corpus.to_numpy(),
        "repeated": documents["id"].is_duplicated().to_numpy(),
    }
    found = {rule: documents["id"].filter(pl.Series(mask)).head(10).to_list() for rule, mask in broken.items()}
    if len(documents) != pairs:
        found["count"] = [f"{len(documents)} examples for {pairs} pairs"]
    return {rule: ids for rule, ids in found.items() if ids}


def check_contents(
    arrays: TokenArrays,
    pairs: Mapping[str, pl.LazyFrame],
    tokens: Mapping[str, Path],
    related_id: int,
    max_document_tokens: int,
    shuffled: bool,
    sample: int = 100,
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples that are not of the pairs or their documents, by rule.

    It is empty where all are. The rules: d1 and d2 are those of `pairs` (`shuffled`: each as often, with other
    partners), the id is "d1->d2", the split is that of d1's hash; of an evenly spaced `sample`, the tokens are those
    of d1 and d2.
    """
    documents, sides = arrays.documents, ["d1", "d2"]
    wanted = pl.concat([frame.select(sides) for _, frame in sorted(pairs.items())]).collect()
    if shuffled:
        same = all(documents[side].sort().equals(wanted[side].sort()) for side in sides)
        other = [] if same else ["(documents)"]
    else:
        other = pl.concat([
            documents.select(sides).join(wanted, on=sides, how="anti"),
            wanted.join(documents.select(sides), on=sides, how="anti"),
        ]).select(pl.format("{}->{}", *sides)).to_series().to_list()  # fmt: skip
    heldout = pl.Series(heldout_seeds(documents["d1"].unique()), dtype=pl.String).implode()
    split = pl.when(pl.col("d1").is_in(heldout)).then(pl.lit(HELDOUT)).otherwise(pl.lit(TRAIN))
    places = np.unique(np.linspace(0, len(documents) - 1, min(sample, len(documents))).astype(int))
    chosen = documents[places]
    ids = pl.concat([chosen["d1"], chosen["d2"]]).unique().implode()
    found: dict[str, np.ndarray] = {}
    for _, directory in sorted(tokens.items()):
        located = locations(directory).filter(pl.col("id").is_in(ids))
        source = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        found |= {name: source[start:stop] for name, start, stop in located.select("id", "start", "stop").iter_rows()}
    untrue = []
    for place, d1, d2, name in zip(places, chosen["d1"], chosen["d2"], chosen["id"], strict=True):
        held = arrays.tokens[arrays.offsets[place] : arrays.offsets[place + 1]]
        known = d1 in found and d2 in found
        if not known or format_example(found[d1], found[d2], related_id, max_document_tokens)[0] != held.tolist():
            untrue.append(name)
    broken = {
        "not the pairs": other,
        "id": documents.filter(pl.col("id") != pl.format("{}->{}", *sides))["id"].to_list(),
        "split": documents.filter(pl.col("split") != split)["id"].to_list(),
        "other tokens": untrue,
    }
    return {rule: names[:10] for rule, names in broken.items() if names}
