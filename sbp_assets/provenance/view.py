"""Prints traces as plain tables for a terminal. Text of documents is untrusted and printed without markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sbp_assets.dagster_support.preview import printable
from sbp_assets.provenance.lookup import Trace

ROWS = 10
STEPS = 6
FOLDED = ("state", "task", "metric", "at steps")


def show(trace: Trace, console: Console) -> None:
    """Print one trace."""
    {
        "document": _document,
        "synthetic_document": _synthetic_document,
        "pair": _pair,
        "earlier_pair": _earlier_pair,
        "score": _score,
        "artifact": _artifact,
    }[trace["kind"]](trace, console)
    _records(trace, console)


def _document(trace: Trace, console: Console) -> None:
    repeats = trace["duplicate_of"]
    fate = (
        {"unique": "in D", "oracle": "in the oracle split", "heldout": "held out"}.get(trace["split"] or "")
        or (f"dropped: repeats {repeats['kept_id']}" if repeats else None)
        or "in no split"
    )
    _title(console, trace["id"], f"document, {fate}")
    _text(console, trace["text"])
    _origin(console, trace["source"])
    _fact(console, "shard", trace["shard"])
    if repeats:
        similarity = "" if repeats["jaccard"] is None else f", Jaccard {repeats['jaccard']:.3f}"
        _fact(console, "duplicate", f"{repeats['kind']}, kept in shard {repeats['kept_shard']}{similarity}")
    if trace["duplicates"]:
        _fact(console, "repeated by", ", ".join(f"{row['id']} ({row['kind']})" for row in trace["duplicates"][:ROWS]))
    if trace["split"] == "heldout":
        scored = "scored for perplexity" if trace["scored_for_perplexity"] else "not among those scored for perplexity"
        _fact(console, "held out", f"no arm trains on it; {scored}")
    if trace["split"] == "unique":
        _pairs(console, "Pairs with it as seed (d1)", trace["pairs_as_seed"])
        _pairs(console, "Pairs with it as related document (d2)", trace["pairs_as_related"])
        rows = [
            (row["id"], row["rollout"], row["n_tokens"], row["finish_reason"]) for row in trace["synthetic_documents"]
        ]
        _table(console, "Synthetic documents from it", ("id", "rollout", "tokens", "finish"), rows)
    _readers(console, trace["readers"])


def _synthetic_document(trace: Trace, console: Console) -> None:
    _title(console, trace["id"], "synthetic document")
    _text(console, trace["text"])
    for key in ("seed_id", "rollout", "sampling_seed", "n_tokens", "finish_reason", "shard"):
        _fact(console, key.replace("_", " ").replace("seed id", "seed document"), trace[key])
    current = {True: "the current one", False: "not the current one: it is stale", None: "no record to compare with"}
    version = f"{trace['synthesizer_version']} ({current[trace['synthesizer_is_current']]})"
    _fact(console, "synthesizer", f"{trace['synthesizer']} {version}")
    _fact(console, "engine", trace["engine"] or "not recorded")
    if seed := trace["seed"]:
        _title(console, seed["id"], f"its seed document, {seed['file']} line {seed['line']}")
        _text(console, seed["text"])
    _pairs(console, "Pairs of that seed document (d1)", trace["seed_pairs"])
    _readers(console, trace["readers"])


def _pair(trace: Trace, console: Console) -> None:
    _title(console, trace["id"], "pair" if trace["kept"] else "no pair: filtered out, or never a candidate")
    for side in ("d1", "d2"):
        document = trace[side]
        _fact(console, side, f"{document['id']}, {document['file']} line {document['line']}, split {document['split']}")
        _text(console, document["text"])
    if trace["kept"]:
        _fact(console, "similarity", f"{trace['similarity']:.4f}")
        _fact(console, "shared shingles", f"{trace['shared_shingles']:.1%} of d2's")
    rows = [
        (row["query_id"], row["neighbor_id"], row["rank"], f"{row['similarity']:.4f}") for row in trace["candidates"]
    ]
    _table(console, "Nearest neighbours it comes from", ("document", "neighbour", "rank", "similarity"), rows)
    _fact(console, "tuning", _tuning(trace["tuning"]))
    _fact(console, "synthetic of d1", f"{trace['synthetic_documents_of_d1']:,}")


def _earlier_pair(trace: Trace, console: Console) -> None:
    _title(console, trace["id"], "pair with a synthetic document of the earlier round")
    written = trace["synthetic_document"]
    if seed := trace["seed"]:
        _fact(console, "document of D", f"{seed['id']}, {seed['file']} line {seed['line']}")
        _text(console, seed["text"])
    _fact(console, "written from it", f"{written['id']} of {written['run']}")
    _text(console, written["text"])
    _fact(console, "tuning", _tuning(trace["tuning"]))


def _score(trace: Trace, console: Console) -> None:
    _title(console, trace["id"], f"scores of {trace['scored']}, training seed {trace['seed']}")
    rows = [
        (row["task"], row["metric"], f"{row['value']:.5g}", "–" if row["stderr"] is None else f"{row['stderr']:.2g}",
         row["samples"])
        for row in trace["scores"]
    ]  # fmt: skip
    _table(console, "Scores", ("task", "metric", "value", "± stderr", "samples"), rows)
    model = trace["model"]
    trained = f", {model['tokens']:,} tokens, held-out loss {model['heldout_loss']:.4f}" if "tokens" in model else ""
    if trace["scored"] != trace["arm"]:
        kept = "" if model.get("step") is None else f", after step {model['step']:,}"
        _fact(console, "scored", f"the {trace['arm']} model at its lowest held-out loss along training{kept}")
    _fact(console, "model", f"{model['asset']}/{model['partition']} {model['record']['data_version'] or ''}{trained}")
    rows = [
        (row["source"], f"{row['unique_documents']:,}", f"{row['unique_tokens']:,}", f"{row['passes']:.2f}",
         f"{row['tokens_read']:,}")
        for row in trace["data"]
    ]  # fmt: skip
    _table(console, "What the model read", ("source", "documents", "tokens", "epochs", "tokens read"), rows)
    for row in trace["synthesizer_versions"]:
        _fact(console, "synthesizer", f"{row['synthesizer_version']} wrote {row['documents']:,} documents")
    if trace["pairs"] is not None:
        _fact(console, "tuned on", f"{trace['pairs']:,} neighbour pairs")
    _fact(console, "documents", ", ".join(f"{split} {count:,}" for split, count in trace["documents"].items()))
    if source := trace["source"]:
        _fact(console, "source", f"{source['files']:,} files, {source['bytes']:,} bytes")
    _fact(console, "used by", ", ".join(trace["used_by"]))


def _artifact(trace: Trace, console: Console) -> None:
    _title(console, trace["id"], "artifact")
    _record_table(console, "It", trace["records"])
    _fact(console, "used by", ", ".join(trace["used_by"]) or "nothing")


def _pairs(console: Console, title: str, pairs: Sequence[dict[str, Any]]) -> None:
    rows = [
        (row["document"], f"{row['similarity']:.4f}", f"{row['shared_shingles']:.1%}", _tuning(row["tuning"]))
        for row in pairs
    ]
    _table(console, title, ("document", "similarity", "shared shingles", "tuning"), rows)


def _tuning(example: dict[str, Any] | None) -> str:
    if example is None:
        return "no example"
    return "held out" if example["split"] == "heldout" else f"read {_times(example['reads'])}"


def _readers(console: Console, readers: Sequence[dict[str, Any]]) -> None:
    rows = []
    for row in readers:
        steps = ", ".join(map(str, row["steps"][:STEPS])) + (", …" if len(row["steps"]) > STEPS else "")
        # The budget may end inside the document: its last reading is then a part of it.
        whole = not row["reads"] or row["tokens"] == row["reads"] * row["document_tokens"]
        state = ("" if row["trained"] else "not trained yet") if whole else "last time in part"
        rows.append((row["arm"], row["seed"], _times(row["reads"]), f"{row['tokens']:,}", steps, state))
    _table(console, "Read by the arms", ("arm", "seed", "times", "tokens", "at steps", ""), rows)


def _records(trace: Trace, console: Console) -> None:
    _record_table(console, "Upstream" if "used_by" in trace else "Passes through", trace["artifacts"])
    for line in trace["missing"]:
        console.print(Text(line, "yellow"))
    console.print()


def _record_table(console: Console, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Print one line per artifact; partitions of one asset in one state are counted together."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["asset"], record["state"], "; ".join(record["reasons"])), []).append(record)
    rows = []
    for (asset, state, reasons), members in groups.items():
        last = max(members, key=lambda record: record["materialised"] or "")
        one = len(members) == 1
        shown = (last["partition"] or "") if one else f"{len(members)} partitions"
        version = (last["data_version"] or "") if one else ""
        materialised = (last["materialised"] or "").replace("T", " ").removesuffix("+00:00")
        rows.append(
            (
                asset,
                shown,
                version,
                materialised,
                (last["run_id"] or "")[:8],
                f"stale: {reasons}" if state == "stale" else reasons or state,
            )
        )
    _table(console, title, ("asset", "partition", "version", "materialised (UTC)", "run", "state"), rows, limit=None)


def _origin(console: Console, source: dict[str, Any]) -> None:
    root = f"{source['root']}: " if source["root"] else ""
    _fact(console, "source", f"{root}{source['file']} line {source['line']}")
    if source["sha256"]:
        _fact(
            console,
            "",
            f"sha256 {source['sha256'][:16]}…" + (f", {source['bytes']:,} bytes" if source["bytes"] else ""),
        )
    if source["url"]:
        _fact(console, "url", source["url"])


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _title(console: Console, name: str, what: str) -> None:
    console.print()
    console.print(Text.assemble((printable(name), "bold cyan"), f"  {what}"))


def _fact(console: Console, label: str, value: object) -> None:
    console.print(Text.assemble((f"{label:<17}", "dim"), printable(str(value))), soft_wrap=True)


def _text(console: Console, text: str) -> None:
    console.print(Text(f"  {printable(text)}", "italic"))


def _table(
    console: Console, title: str, columns: Iterable[str], rows: Sequence[Sequence[object]], limit: int | None = ROWS
) -> None:
    if not rows:
        return
    table = Table(box=None, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(Text(column, "dim"), overflow="fold", no_wrap=column not in FOLDED)
    for row in rows[:limit]:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print()
    console.print(table)
    if limit is not None and len(rows) > limit:
        console.print(Text(f"… and {len(rows) - limit:,} more; --json lists all", "dim"))
