"""Processor and clock time of a run that does nothing, in Dagster's storage in SQLite and in ours, by turns.

One asset and two checks, executed in this process: `python -m benchmarks.event_log [RUNS]`. Medians over the runs
(default: 40), each storage with an instance of its own; two runs before them are not counted. The last line is a JSON
object; its ratio is Dagster's processor time over ours.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from contextlib import ExitStack

import dagster as dg

from benchmarks import machine
from benchmarks.arguments import parser
from sbp_assets.instance.sqlite_storage import SqliteStorage

CUSTOM = {"module": SqliteStorage.__module__, "class": SqliteStorage.__name__}


@dg.asset
def nothing() -> None:
    """Make nothing."""


def check(name: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=nothing, name=name)
    def passed() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    return passed


def main() -> None:
    taking = parser(__doc__)
    taking.add_argument("runs", nargs="?", type=int, default=40)
    runs: int = taking.parse_args().runs
    logging.disable(logging.INFO)
    job = dg.define_asset_job("job", executor_def=dg.in_process_executor)
    defs = dg.Definitions(assets=[nothing], asset_checks=[check("one"), check("two")], jobs=[job])
    definition = defs.resolve_job_def("job")
    with ExitStack() as stack:
        instances = {}
        for name in ("dagster", "ours"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"sbp-{name}-"))
            config = {"base_dir": folder}
            storage = {"sqlite": config} if name == "dagster" else {"custom": {**CUSTOM, "config": config}}
            opened = dg.DagsterInstance.local_temp(folder, {"storage": storage, "telemetry": {"enabled": False}})
            instances[name] = stack.enter_context(opened)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in instances}
        for _ in range(runs + 2):
            for name, instance in instances.items():
                began = time.process_time(), time.perf_counter()
                assert definition.execute_in_process(instance=instance).success
                taken[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    found = {}
    for name, times in taken.items():
        processor, clock = (round(statistics.median(column), 4) for column in zip(*times[2:], strict=True))
        found[name] = {"processor_seconds": processor, "seconds": clock}
        print(f"{name}: {processor:.3f} s of the processor, {clock:.3f} s by the clock")
    ratio = round(found["dagster"]["processor_seconds"] / found["ours"]["processor_seconds"], 2)
    print(json.dumps({"runs": runs, **found, "ratio": ratio, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
