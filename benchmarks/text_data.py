"""The data of benchmarks.text_gpu: what is needed of a store, in one folder or a .tar.xz of it."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.split import HELDOUT, ORACLE
from sbp_assets.settings import Experiment, load_settings
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays

# So many pairs, documents of the oracle and held-out ones, and tokens of each: seconds on a CPU.
TINY: dict[str, Any] = {"pairs": 20, ORACLE: 60, HELDOUT: 10, "tokens": 100}


def export(folder: Path) -> dict[str, Any]:
    """Write the settings, tokenizer, tokens and pairs of the profile's store into `folder` and into `folder`.tar.xz.

    Shards become one: what the arms read and how pairs are dealt does not depend on shards. Returns documents and
    tokens by split, the pairs, and the bytes of the archive.
    """
    settings = load_settings()
    store = Path(settings.deployment.data_dir)
    arrays = [TokenArrays.load(store / "corpus/tokens" / key) for key in settings.experiment.shard_keys]
    documents = pl.concat([part.documents.select("id", "split") for part in arrays])

    def encoded() -> Iterator[np.ndarray]:
        for part in arrays:
            for start, stop in zip(part.offsets[:-1], part.offsets[1:], strict=True):
                yield part.tokens[start:stop]

    largest = max(int(part.tokens.max()) for part in arrays)
    write_token_arrays(folder / "tokens", documents, encoded(), largest + 1)
    pairs = pl.concat([
        pl.read_parquet(store / f"pairing/neighbor_pairs/{key}.parquet", columns=["d1", "d2"], glob=False)
        for key in settings.experiment.shard_keys
    ]).sort("d1", "d2")  # fmt: skip
    pairs.write_parquet(folder / "pairs.parquet", compression="zstd")
    shutil.copytree(store / "corpus/tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    (folder / "experiment.json").write_text(settings.experiment.model_dump_json(indent=1), encoding="utf-8")
    archive = folder.with_name(folder.name + ".tar.xz")
    with tarfile.open(archive, "w:xz") as stream:
        stream.add(folder, arcname=".")
    lengths = documents.with_columns(tokens=np.concatenate([part.lengths for part in arrays]))
    counts = lengths.group_by("split").agg(pl.len().alias("documents"), pl.col("tokens").sum()).sort("split")
    return {"splits": counts.to_dicts(), "pairs": len(pairs), "archive_bytes": archive.stat().st_size}


def load(path: Path, scratch: Path) -> tuple[Path, Experiment]:
    """Return the folder that `export` has written and its settings; an archive of it is unpacked into `scratch`."""
    if path.name.endswith(".tar.xz"):
        with tarfile.open(path) as stream:
            stream.extractall(scratch / "data", filter="data")
        path = scratch / "data"
    return path, Experiment.model_validate_json((path / "experiment.json").read_text(encoding="utf-8"))


def smaller(data: Path, experiment: Experiment, folder: Path, counts: dict[str, Any]) -> tuple[Path, Experiment]:
    """Write the first few pairs and documents into `folder`; return it and settings of a tiny model."""
    pairs = pl.read_parquet(data / "pairs.parquet", glob=False).head(counts["pairs"])
    arrays = TokenArrays.load(data / "tokens")
    named = pl.concat([pairs["d1"], pairs["d2"]]).unique().implode()
    numbered = arrays.documents.with_row_index("row")
    rows = [numbered.filter(pl.col("id").is_in(named))["row"].to_list()]
    rows += [numbered.filter(split=split).head(counts[split])["row"].to_list() for split in (ORACLE, HELDOUT)]
    chosen = [row for part in rows for row in part]
    whole = [arrays.tokens[arrays.offsets[row] : arrays.offsets[row + 1]] for row in chosen]
    encoded = [np.append(ids[:-1][: counts["tokens"]], ids[-1]) for ids in whole]
    write_token_arrays(folder / "tokens", arrays.documents[chosen], encoded, int(arrays.tokens.max()) + 1)
    pairs.write_parquet(folder / "pairs.parquet")
    shutil.copytree(data / "tokenizer", folder / "tokenizer")
    context = 256
    settings = experiment.model_dump()
    settings["model"] |= {
        "hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate_size": 128,
        "context_length": context,
    }  # fmt: skip
    settings["pretraining"] |= {
        "tokens_per_step": 4 * context, "repetitions": 4, "evaluations": 2, "heldout_tokens": 2000
    }  # fmt: skip
    settings["synthesizer"] |= {"tokens_per_step": 4 * context, "epochs": 1, "max_document_tokens": None}
    return folder, Experiment.model_validate(settings)
