"""Finds out whether a tasks folder is as this project wrote it, and holds the data that it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import polars as pl

from sbp_assets.evaluation.task_files import LOCAL_DATA, file_texts
from sbp_assets.evaluation.tasks import DATA, HELDOUT, MANIFEST, QUESTIONS, README, Tasks
from sbp_assets.storage.paths import read_table


def foreign_files(directory: Path) -> list[str]:
    """Return the files in a tasks folder that `write_tasks` did not write or that were changed since, its data apart.

    lm-eval imports the functions that task files name, also from Python files beside them: what others have put there
    must not be run.
    """
    texts = {LOCAL_DATA.name: LOCAL_DATA.read_bytes()}
    for task in Tasks.load(directory).tasks:
        own_shots = (directory / DATA / f"{task.lm_eval}.shots.parquet").is_file()
        texts |= {name: text.encode() for name, text in file_texts(task, own_shots).items()}
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    inert = {name for name in found if name in (MANIFEST, README) or PurePath(name).match(f"{DATA}/*.parquet")}
    return sorted(name for name in found.keys() - inert if texts.get(name) != found[name].read_bytes())


def data_problems(
    directory: Path, documents: Mapping[str, pl.LazyFrame], questions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Return what is wrong with the data of a tasks folder, a sentence each.

    Wrong are data that cannot be read, other numbers of rows than the manifest says, held-out documents that are not
    those of the corpus (`documents`: id, text and split by shard), and questions that are not `questions` (by task), in
    order.
    """
    problems = []
    for task in Tasks.load(directory).tasks:
        try:
            rows = read_table(directory / DATA / f"{task.lm_eval}.test.parquet")
        except (OSError, pl.exceptions.PolarsError) as error:
            problems.append(f"{task.name}: its data cannot be read: {error}")
            continue
        if len(rows) != task.documents:
            problems.append(f"{task.name}: {len(rows)} rows of {task.documents}")
        if task.name == HELDOUT:
            wanted = rows.lazy().select("id", "text")
            held = [frame.filter(pl.col("split") == HELDOUT).select("id", "text") for frame in documents.values()]
            known = pl.concat(held).join(wanted, on=["id", "text"], how="semi").collect(engine="streaming")
            strange = rows.join(known, on="id", how="anti")["id"]
            problems += [f"{name}: no held-out document of this text" for name in strange.head(10)]
        elif task.name in QUESTIONS:
            own = questions.get(task.name, ())
            asked = pl.DataFrame([{name: question[name] for name in rows.columns} for question in own])
            if not asked.equals(rows):
                problems.append(f"{task.name}: not the questions of the settings, in their order")
    return problems
