"""Non-factual and pair-irrelevance as a language model judges them.

The paper judges both with a model. A question is one document (or a synthetic document and its seed) in the wording of
`prompts/<revision>/<metric>.md`; the answer's last line is the verdict. Whatever does not end in a verdict is
*unjudged*, with the reason, and never guessed: an endpoint that is down, refuses, is too slow or talks nonsense.

Every outcome is a line of a ledger at once, its cost with it. A question is known there by a digest of all that was
asked of which model, so a stopped run resumes, changed texts or prompts are new questions, and what was
unjudged is asked again by the next run.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any, TextIO

import polars as pl

from sbp_assets.settings import Judge
from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.endpoint import Ask, Endpoint
from sbp_assets.synthesis.quality import DOCUMENTS_AND_SEEDS, JUDGE, QUALITY_SCHEMA, REAL, SYNTHETIC, row
from sbp_assets.synthesis.questions import VERDICTS, Question, load_prompts, parse_verdict

logger = logging.getLogger("sbp_assets.synthesis.judge")

# Of one question, while no verdict can be read from the answer.
MAX_ANSWERS = 3
ANSWER_DELAY = 0.5  # Seconds before asking again; doubles.
# So many questions in a row that the endpoint failed to answer, each after its retries, mean that it is down.
GIVE_UP_AFTER = 10
NOT_ASKED, UNPARSEABLE = "not_asked", "unparseable"

JUDGEMENT_COLUMNS = [
    Column("id", pl.String, "Document that was judged.", "synthesis/synthetic_documents.id corpus/documents.id"),
    Column("corpus", pl.String, "synthetic, or real (documents of D)."),
    Column("metric", pl.String, "non_factual, or pair_irrelevance (synthetic documents only)."),
    Column("verdict", pl.Boolean, "Whether the judge found that fault; null where unjudged.", DOCUMENTS_AND_SEEDS),
    Column(
        "unjudged",
        pl.String,
        "timeout, connection, http_<status>, unparseable, not_asked or client_error; or null.",
        DOCUMENTS_AND_SEEDS,
    ),
    Column("answer", pl.String, "The judge's words, the last ones where it was asked again.", DOCUMENTS_AND_SEEDS),
    Column(
        "prompt_tokens",
        pl.Int64,
        "As the endpoint counted them, over all answers to this question.",
        DOCUMENTS_AND_SEEDS,
    ),
    Column("completion_tokens", pl.Int64, "Likewise.", DOCUMENTS_AND_SEEDS),
]
JUDGEMENT_SCHEMA = table_schema(JUDGEMENT_COLUMNS)


@dataclass(frozen=True)
class Record:
    """A line of the ledger: how a question went in one session. `seconds` includes waiting between tries."""

    key: str
    verdict: bool | None
    unjudged: str | None
    answer: str | None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def judge(
    asked: Sequence[Question], settings: Judge, endpoint: Endpoint, ledger: Path, progress: Progress
) -> tuple[pl.DataFrame, dict[str, int | float]]:
    """Return rows of JUDGEMENT_SCHEMA, one per question, in their order, and what they took.

    Questions with a verdict in the file `ledger` are not asked again; `progress` counts questions. No failure of the
    endpoint raises. The counts: judged, unjudged, unjudged_{reason}, resumed; and of all sessions together, failed
    tries included: requests, prompt_tokens, completion_tokens, judge_seconds (spent on questions, summed over those
    that were asked side by side). Raises what opening a session of the endpoint raises.
    """
    reminder = load_prompts(settings.prompts)["reminder"]
    by_key = {question.key: question for question in asked}
    records = _read(ledger, by_key)
    done = {record.key: record for record in records if record.verdict is not None}
    open_ = [question for key, question in by_key.items() if key not in done]
    outcome = dict(done)
    progress.advance(len(done))
    if open_:
        stop = threading.Event()
        failed = 0
        with endpoint.session() as ask, _appending(ledger) as stream:
            pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge")
            try:
                futures = [pool.submit(_ask, ask, question, settings, reminder, stop) for question in open_]
                for future in as_completed(futures):
                    record = outcome[future.result().key] = future.result()
                    if record.unjudged != NOT_ASKED:
                        stream.write(json.dumps(asdict(record)) + "\n")
                        stream.flush()
                        records.append(record)
                        # What answers nonsense is up: only an endpoint that does not answer ends the questions.
                        failed = failed + 1 if record.unjudged not in (None, UNPARSEABLE) else 0
                    if failed == GIVE_UP_AFTER and not stop.is_set():
                        logger.warning(
                            "the judge did not answer %d questions in a row (%s): the rest stays unjudged; "
                            "re-materialise to ask it",
                            failed,
                            record.unjudged,
                        )
                        stop.set()
                    progress.advance()
            finally:
                stop.set()
                # Not waited for: when interrupted, leaving the session ends what is under way.
                pool.shutdown(wait=False, cancel_futures=True)
    rows = [
        {**asdict(outcome[question.key]), "id": question.id, "corpus": question.corpus, "metric": question.metric}
        for question in asked
    ]
    table = pl.DataFrame([{name: row_[name] for name in JUDGEMENT_SCHEMA} for row_ in rows], schema=JUDGEMENT_SCHEMA)
    reasons = Counter(table["unjudged"].drop_nulls().to_list())
    judged = len(table) - table["verdict"].null_count()
    return table, {
        "judged": judged,
        "unjudged": len(table) - judged,
        **{f"unjudged_{reason}": count for reason, count in sorted(reasons.items())},
        "resumed": len(done),
        "requests": sum(record.requests for record in records),
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "completion_tokens": sum(record.completion_tokens for record in records),
        "judge_seconds": round(sum(record.seconds for record in records), 3),
    }


def judged_rows(judgements: pl.DataFrame) -> pl.DataFrame:
    """Return rows of the quality table: the share at fault among the judged, their number, and the sample's size."""
    rows = []
    for metric in VERDICTS:
        for corpus in (SYNTHETIC, REAL):
            found = judgements.filter(metric=metric, corpus=corpus)
            judged = len(found) - found["verdict"].null_count()
            flagged = int(found["verdict"].sum())
            rows.append(row(metric, corpus, JUDGE, flagged, judged, judged, len(found)))
    return pl.DataFrame(rows, schema=QUALITY_SCHEMA)


def _ask(ask: Ask, question: Question, settings: Judge, reminder: Template, stop: threading.Event) -> Record:
    """One question, put again while the answer has no verdict."""
    if stop.is_set():
        return Record(question.key, None, NOT_ASKED, None)
    began, cost = time.monotonic(), Counter[str]()
    messages, content, verdict = list(question.messages), None, None
    unjudged: str | None = UNPARSEABLE
    for attempt in range(MAX_ANSWERS):
        # `stop` is not seen while the endpoint is asked, but before the next answer.
        if attempt and stop.wait(ANSWER_DELAY * 2 ** (attempt - 1)):
            break
        answer = ask(messages, settings)
        cost.update(requests=answer.requests, prompt=answer.prompt_tokens, completion=answer.completion_tokens)
        if answer.failure:
            unjudged = answer.failure
            break
        content = answer.content
        if content is not None and (verdict := parse_verdict(content, question.metric)) is not None:
            unjudged = None
            break
        wording = reminder.substitute(verdicts="\n".join(f"Verdict: {word}" for word in VERDICTS[question.metric]))
        messages = [
            *question.messages,
            {"role": "assistant", "content": content or ""},
            {"role": "user", "content": wording},
        ]
    return Record(
        key=question.key,
        verdict=verdict,
        unjudged=unjudged,
        answer=content,
        requests=cost["requests"],
        prompt_tokens=cost["prompt"],
        completion_tokens=cost["completion"],
        seconds=round(time.monotonic() - began, 3),
    )


def _read(ledger: Path, wanted: Mapping[str, Any]) -> list[Record]:
    """Return the records of the wanted questions; a line that a kill tore is left out, and its question asked again."""
    if not ledger.exists():
        return []
    records = []
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            logger.warning("%s: a corrupted line is dropped and its question asked again", ledger)
            continue
        if record.key in wanted:
            records.append(record)
    return records


@contextmanager
def _appending(ledger: Path) -> Iterator[TextIO]:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with named_when_full(ledger), ledger.open("a+", encoding="utf-8") as stream:
        # After a torn line, begin a new one.
        if stream.tell() and not ledger.read_bytes().endswith(b"\n"):
            stream.write("\n")
        yield stream
