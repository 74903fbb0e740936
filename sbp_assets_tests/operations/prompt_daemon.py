"""dagster-daemon that looks for work every second, where its own waits are 5 seconds and, of backfills, 30.

`python -m sbp_assets_tests.operations.prompt_daemon RELOAD run …` stands for `python -m dagster._daemon run …`. RELOAD
is after how many seconds the code is loaded again, by a new process that takes three seconds of the processor;
Dagster's own daemon does so each minute. Nothing else differs. test_containers.py runs the daemon as it is.
"""

import sys
from typing import Any

from dagster._daemon import asset_daemon, controller, sensor
from dagster._daemon.cli import main
from dagster._daemon.daemon import IntervalDaemon

SECONDS = 1.0


def look_often(reload_seconds: float) -> None:
    """Shorten the waits of this process' daemons: queue, run monitoring, retries; sensors, automation; backfills."""
    own = IntervalDaemon.__init__

    def with_shorter_waits(self: IntervalDaemon, interval_seconds: float, **options: Any) -> None:
        own(self, min(interval_seconds, SECONDS) if interval_seconds <= 5 else interval_seconds, **options)

    IntervalDaemon.__init__ = with_shorter_waits  # type: ignore[method-assign]
    asset_daemon.MIN_INTERVAL_LOOP_SECONDS = sensor.MIN_INTERVAL_LOOP_TIME = SECONDS  # type: ignore[assignment]
    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = SECONDS  # type: ignore[assignment]
    controller.RELOAD_WORKSPACE_INTERVAL = reload_seconds  # type: ignore[assignment]


if __name__ == "__main__":
    look_often(float(sys.argv.pop(1)))
    main()
