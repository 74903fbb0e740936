"""Loads the data of the lm-eval tasks beside this file, wherever the folder lies. Copied into the tasks artifact."""

from pathlib import Path
from typing import Any

import datasets
from pyarrow import parquet


def load(data: str, subject: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Splits of a task, from data/<data>.<split>.parquet; of one `subject` where given.

    lm-eval calls this with the task's dataset_kwargs, and with its metadata and the model's arguments, unused here.
    """
    filters = None if subject is None else [("subject", "==", subject)]
    files = sorted((Path(__file__).parent / "data").glob(f"{data}.*.parquet"))
    return datasets.DatasetDict({
        file.stem.removeprefix(f"{data}."): datasets.Dataset(parquet.read_table(file, filters=filters))
        for file in files
    })  # fmt: skip
