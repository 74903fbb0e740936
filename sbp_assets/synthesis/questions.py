"""What a judge is asked about documents, and how its answers are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

import polars as pl

from sbp_assets.settings import Judge
from sbp_assets.settings.experiment import PROMPTS
from sbp_assets.storage.artifacts import content_version
from sbp_assets.synthesis.quality import REAL, SYNTHETIC, fixed_sample, ids_of, texts_of, with_seeds

# The word of a verdict, and whether it finds the document at fault.
VERDICTS: dict[str, dict[str, bool]] = {
    "non_factual": {"FACTUAL": False, "NON_FACTUAL": True},
    "pair_irrelevance": {"RELATED": False, "UNRELATED": True},
}
_VERDICT_LINE = re.compile(r"(?im)^[^\w\n]*verdict[^\w\n:]*:(.*)$")
Message = dict[str, str]


class JudgeError(ValueError):
    """No judge can be asked; the message says why."""


@dataclass(frozen=True)
class Question:
    """What is asked about one document; `key` is the digest of everything that decides the answer."""

    id: str
    corpus: str
    metric: str
    messages: list[Message]
    key: str


def load_prompts(revision: str) -> dict[str, Template]:
    """Return the wording of each metric's question, and of the `reminder`."""
    names = (*VERDICTS, "reminder")
    return {name: Template((PROMPTS / revision / f"{name}.md").read_text(encoding="utf-8")) for name in names}


def prompts_version(revision: str) -> str:
    """Return the digest of a revision's wording (16 hex digits), which a revision's name does not pin."""
    return content_version(PROMPTS / revision)


def sample_documents(
    synthetic: Mapping[str, pl.LazyFrame], documents: Mapping[str, pl.LazyFrame], size: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return fixed samples of `size` synthetic documents (id, text, seed_text) and of `size` documents of D (id, text).

    `synthetic` (id, seed_id, text) and `documents` (id, text; D alone) hold every shard; memory is the sample's and one
    shard's ids.
    """
    parts: dict[str, list[pl.DataFrame]] = {}
    for corpus, shards in ((SYNTHETIC, synthetic), (REAL, documents)):
        chosen = fixed_sample({shard: ids_of(frame) for shard, frame in shards.items()}, size)
        for shard, ids in sorted(chosen.items()):
            part = (
                with_seeds(texts_of(shards[shard], ids, "seed_id"), documents[shard]).drop("seed_id")
                if corpus == SYNTHETIC
                else texts_of(shards[shard], ids)
            )
            parts.setdefault(corpus, []).append(part)
    nothing = pl.DataFrame(schema={"id": pl.String, "text": pl.String, "seed_text": pl.String})
    return pl.concat(parts.get(SYNTHETIC, [nothing])), pl.concat(parts.get(REAL, [nothing.drop("seed_text")]))


def questions(synthetic: pl.DataFrame, real: pl.DataFrame, settings: Judge) -> list[Question]:
    """Return the questions: non-factual of every document, pair-irrelevance of every synthetic one.

    `synthetic` and `real` are the frames that `sample_documents` returns.
    """
    prompts = load_prompts(settings.prompts)

    def question(document_id: str, corpus: str, metric: str, **texts: str) -> Question:
        cut = {name: text[: settings.max_chars] for name, text in texts.items()}
        # Templates are filled once, so a document that holds `$seed` stays as it is.
        messages = [{"role": "user", "content": prompts[metric].substitute(cut)}]
        asked = [settings.model, settings.max_tokens, settings.temperature, prompts["reminder"].template, messages]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return Question(document_id, corpus, metric, messages, key)

    found = []
    for row_ in synthetic.iter_rows(named=True):
        found.append(question(row_["id"], SYNTHETIC, "non_factual", document=row_["text"]))
        texts = {"document": row_["text"], "seed": row_["seed_text"]}
        found.append(question(row_["id"], SYNTHETIC, "pair_irrelevance", **texts))
    found += [question(row_["id"], REAL, "non_factual", document=row_["text"]) for row_ in real.iter_rows(named=True)]
    return found


def parse_verdict(answer: str, metric: str) -> bool | None:
    """Return whether the answer's verdict finds fault; None where it has none, an unknown one, or two that differ."""
    words = {re.sub(r"[\W_]+", "_", line).strip("_").upper() for line in _VERDICT_LINE.findall(answer)}
    return VERDICTS[metric].get(words.pop()) if len(words) == 1 else None
