"""Messages of an external process, written in pieces."""

import sys

import dagster as dg

from sbp_assets.training.pipes import WholeLinesMessageReader

# Writes a log message as Dagster Pipes does, but a piece at a time with pauses in between.
SCRIPT = """
import time
from dagster_pipes import PipesFileMessageWriterChannel, open_dagster_pipes

def write_in_pieces(self, message):
    import json
    line = json.dumps(message) + chr(10)
    for start in range(0, len(line), 60):
        with open(self._path, "a") as file:
            file.write(line[start : start + 60])
        time.sleep(0.03)

PipesFileMessageWriterChannel.write_message = write_in_pieces
with open_dagster_pipes() as pipes:
    pipes.log.info("first " + "x" * 200)
    pipes.log.info("last")
"""


def test_lines_written_in_pieces_arrive_whole():
    @dg.asset
    def chatty(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient):
        return pipes.run(context=context, command=[sys.executable, "-c", SCRIPT]).get_materialize_result()

    client = dg.PipesSubprocessClient(message_reader=WholeLinesMessageReader())
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([chatty], instance=instance, resources={"pipes": client})
        logs = [record.user_message for record in instance.all_logs(result.run_id)]
    assert "first " + "x" * 200 in logs and "last" in logs
