"""Settings of the corpus: its source, shards, de-duplication, splits and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sbp_assets.settings.section import Fraction, Section


class ConceptsSource(Section):
    """The embedded corpus: seeded documents about invented concepts, the truth of every sentence known."""

    kind: Literal["concepts"] = "concepts"
    documents: PositiveInt = Field(description="Documents generated over all shards.")
    concepts: PositiveInt = Field(150, description="Invented concepts the documents are about.")
    attributes: Annotated[int, Field(ge=2, le=8)] = Field(6, description="Facts that exist per concept.")
    facts_per_document: Annotated[int, Field(ge=1, le=8)] = Field(3, description="Facts one document states.")
    restatements: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="Of those facts, how many the document states once more, in another wording, near its end."
    )
    zipf_exponent: Annotated[float, Field(ge=0)] = Field(0.8, description="Popularity of concept r is r**-exponent.")
    seed: NonNegativeInt = 0


class FiveTokensSource(Section):
    """The negative control: documents of letters drawn uniformly from five, which nothing can be learned from."""

    kind: Literal["five_tokens"] = "five_tokens"
    documents: PositiveInt = Field(description="Documents generated over all shards.")
    tokens_per_document: Annotated[int, Field(ge=16)] = Field(96, description="Letters of a document, on average.")
    seed: NonNegativeInt = 0


class FilesSource(Section):
    """Files under a path or fsspec URL: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or .txt (one document a file)."""

    kind: Literal["files"] = "files"
    path: str = Field(min_length=1, description="A file, a directory (read recursively), a glob, or an fsspec URL.")
    text_field: str = "text"
    id_field: str | None = Field("id", description="Null, or absent from a row: the id is made from file and line.")
    url_field: str = "url"
    files_per_shard: PositiveInt | None = Field(
        None, description="Null: files are dealt over the shards. A number keeps assignments as files are added."
    )


class HubSource(Section):
    """A Hugging Face data set, streamed."""

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="Pin a commit for a reproducible corpus.")
    text_field: str = "text"
    id_field: str | None = "id"
    url_field: str = "url"
    max_documents: PositiveInt | None = None


class Dedup(Section):
    """MinHash-LSH proposes duplicate candidates; the exact Jaccard similarity of word shingles decides."""

    shingle_words: PositiveInt = 5
    permutations: PositiveInt = 128
    bands: PositiveInt = 32
    threshold: Fraction = Field(0.8, description="Exact Jaccard similarity at or above which a document is dropped.")
    seed: NonNegativeInt = 42

    @model_validator(mode="after")
    def _bands_divide(self) -> Dedup:
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})")
        return self


class Split(Section):
    """Shares of the de-duplicated documents, by salted hash of the id; what is left over is not used."""

    unique: Fraction = Field(
        description="D: the fixed corpus that the baseline repeats and the synthesizer learns from."
    )
    oracle: Fraction = Field(description="Further real documents that only the oracle arm reads.")
    heldout: Fraction = Field(description="Documents no arm trains on.")
    salt: str = "sbp"

    @model_validator(mode="after")
    def _possible(self) -> Split:
        if self.heldout <= 0:
            raise ValueError("heldout must be above 0: without held-out documents no arm can be compared")
        if self.unique <= 0:
            raise ValueError("unique must be above 0: it is the corpus to learn from")
        if self.unique + self.oracle + self.heldout > 1 + 1e-9:
            raise ValueError(f"unique + oracle + heldout is {self.unique + self.oracle + self.heldout:g}, above 1")
        return self


class Tokenizer(Section):
    """A byte-level BPE trained on D, or a named Hugging Face tokenizer (name or path)."""

    name: str | None = None
    vocab_size: Annotated[int, Field(ge=300)] = Field(4096, description="Of the trained tokenizer, specials included.")


class Corpus(Section):
    source: Annotated[ConceptsSource | FiveTokensSource | FilesSource | HubSource, Field(discriminator="kind")]
    shards: Annotated[int, Field(ge=1, le=100_000)]
    max_chars: PositiveInt | None = Field(None, description="Longer documents are cut here, at a word boundary.")
    dedup: Dedup = Dedup()
    split: Split
    tokenizer: Tokenizer = Tokenizer()
    expected_unique_tokens: PositiveInt | None = Field(
        None, description="Tokens that D is expected to hold: for `sbp plan` alone, never part of an asset's version."
    )
    expected_unique_documents: PositiveInt | None = Field(
        None, description="Documents that D is expected to hold; null: expected_unique_tokens at a mean length."
    )
