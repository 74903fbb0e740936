"""Settings of the corpus: its source, shards, de-duplication, splits and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sbp_assets.settings.formats import Location
from sbp_assets.settings.section import Count, Fraction, Integer, Name, Real, Section, Seed


class ConceptsSource(Section):
    """The embedded corpus: documents about invented concepts in two views, with the ground truth of every sentence."""

    kind: Literal["concepts"] = Field("concepts", description="Kind of source.")
    documents: Count = Field(description="Documents generated over all shards.")
    concepts: Integer = Field(
        150, ge=4, le=3600, description="Invented concepts the documents are about; a question has four to choose from."
    )
    attributes: Integer = Field(3, ge=2, le=6, description="Facts that exist about each concept.")
    facts_per_document: Annotated[Integer, Field(ge=1, le=6)] | None = Field(
        None,
        description="Facts that each document states; null: all. What d1 lacks cannot be copied from it into d2.",
    )
    inverted_share: Fraction = Field(
        0.4,
        description="Share of the documents that tell the facts first and the name last (riddles, crosswords, an "
        "index); the others are entries, which begin with the name.",
    )
    zipf_exponent: Real = Field(
        0.8,
        ge=0,
        le=20,
        description="The concept of rank r is drawn with weight r**-zipf_exponent: of rare concepts D has few "
        "documents, and many of them in one view alone.",
    )
    seed: Seed = Field(0, description="Seed of the generated documents.")


class FiveTokensSource(Section):
    """The negative control: documents of letters drawn uniformly from five, which nothing can be learned from."""

    kind: Literal["five_tokens"] = Field("five_tokens", description="Kind of source.")
    documents: Count = Field(description="Documents generated over all shards.")
    tokens_per_document: Integer = Field(96, ge=16, le=2**53, description="Mean number of letters in a document.")
    seed: Seed = Field(0, description="Seed of the generated documents.")


class FilesSource(Section):
    """Files under a path or fsspec URL: .jsonl or .ndjson, .parquet, .txt (one document a file); .gz, .zst or .zstd."""

    kind: Literal["files"] = Field("files", description="Kind of source.")
    path: Location = Field(description="A file, a directory (read recursively), a glob, or an fsspec URL.")
    text_field: Name = Field("text", description="Field of a row that holds the text.")
    id_field: Name | None = Field(
        "id",
        description="Field of a row that holds its id; null, or absent from the row: it is made from file and line.",
    )
    url_field: Name | None = Field(
        "url", description="Field of a row that holds its URL, where there is one; null: none is read."
    )
    files_per_shard: Count | None = Field(
        None,
        description="Files of a shard, in the order of their names, so that files keep their shard as others are "
        "added; null: all files are assigned to the shards in turn.",
    )


class HubSource(Section):
    """A Hugging Face data set, streamed."""

    kind: Literal["hub"] = Field("hub", description="Kind of source.")
    name: Name = Field(description="Name of the data set on the hub, or the path of a local one.")
    config: Name | None = Field(None, description="Configuration of the data set; null: its default.")
    split: Name = Field("train", description="Split of the data set that is read.")
    revision: Name | None = Field(
        None, description="Commit of the data set, which makes the corpus reproducible; null: the latest."
    )
    text_field: Name = Field("text", description="Field of a row that holds the text.")
    id_field: Name | None = Field(
        "id",
        description="Field of a row that holds its id; null, or absent from the row: the id is made from its place.",
    )
    url_field: Name | None = Field(
        "url", description="Field of a row that holds its URL, where there is one; null: none is read."
    )
    max_documents: Count | None = Field(
        None,
        description="Rows that are read, at most; null: all. Up to 100,000 these are the first ones, which every shard "
        "streams. Beyond, with as many files as shards or more, each shard reads an equal part from its own files.",
    )


class Dedup(Section):
    """MinHash-LSH proposes duplicate candidates; the exact Jaccard similarity of word shingles decides."""

    shingle_words: Integer = Field(5, ge=1, le=1000, description="Words in a shingle.")
    permutations: Integer = Field(128, ge=1, le=65_536, description="Hash functions of a MinHash signature.")
    bands: Count = Field(32, description="LSH bands of a signature; one band in common makes two documents candidates.")
    threshold: Fraction = Field(
        0.8, description="Exact Jaccard similarity, 0 to 1, from which a document is dropped as a duplicate."
    )
    seed: Seed = Field(42, description="Seed of the hash functions.")

    @model_validator(mode="after")
    def _bands_divide(self) -> Dedup:
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})")
        return self


class Split(Section):
    """Shares of the de-duplicated documents, 0 to 1, by salted hash of the id; documents beyond them are not used."""

    unique: Fraction = Field(
        description="Share of D, the fixed corpus that the baseline repeats and the synthesizer learns from."
    )
    oracle: Fraction = Field(description="Share of further real documents that only the oracle arm reads.")
    heldout: Fraction = Field(description="Share of documents that no arm trains on.")
    salt: str = Field("sbp", description="Text that is hashed with the id; another salt gives another split.")

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

    name: Name | None = Field(
        None, description="Name on the hub, or path, of a tokenizer that is used as it is; null: one is trained on D."
    )
    vocab_size: Integer = Field(
        4096, ge=300, le=10_000_000, description="Tokens of the trained tokenizer, special tokens included."
    )


class Corpus(Section):
    """The real documents: where they come from, their de-duplication, their splits and their tokens."""

    source: Annotated[
        ConceptsSource | FiveTokensSource | FilesSource | HubSource,
        Field(discriminator="kind", description="Where the documents come from; `kind` selects the form."),
    ]
    shards: Integer = Field(ge=1, le=100_000, description="Shards of the corpus, each a partition.")
    max_chars: Count | None = Field(
        None, description="Characters at which longer documents are cut, at a word boundary; null: none is."
    )
    max_row_bytes: Count = Field(
        2**24,
        description="Bytes of a row (a line, a .txt file; text, id, URL and source of a Parquet row) above which it is "
        "rejected, so that one row cannot fill the memory.",
    )
    max_repeated_ids: Fraction = Field(
        0.01,
        description="Share of the documents, 0 to 1, that may be lost because a document of another text has their id; "
        "above it, the run stops: such ids are those of a file, say, and not of the corpus.",
    )
    dedup: Dedup = Field(Dedup(), description="De-duplication.")
    split: Split = Field(description="Shares of the splits.")
    tokenizer: Tokenizer = Field(Tokenizer(), description="Tokenizer of all models.")
    expected_unique_tokens: Count | None = Field(
        None,
        description="Tokens that D is expected to hold; null: unknown. For `sbp plan` alone: it enters no version but "
        "the report's, which prints all settings.",
    )
    expected_unique_documents: Count | None = Field(
        None,
        description="Documents that D is expected to hold; null: as many as those tokens make. Likewise.",
    )
