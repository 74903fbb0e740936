"""dagster-daemon that looks for work every second, where its own waits are 5 seconds and, of backfills, 30.

Nothing else differs: `python -m sbp_assets_tests.operations.prompt_daemon run …` for `python -m dagster._daemon run …`.
The tests would otherwise wait most of their time until it looks. test_containers.py runs the daemon as it is.
"""

from typing import Any

from dagster._daemon import asset_daemon, controller, sensor
from dagster._daemon.cli import main
from dagster._daemon.daemon import IntervalDaemon

SECONDS = 1


def look_often() -> None:
    """Shorten the waits of this process' daemons: queue, run monitoring, retries; sensors, automation; backfills."""
    own = IntervalDaemon.__init__

    def with_shorter_waits(self: IntervalDaemon, interval_seconds: float, **options: Any) -> None:
        # 5 becomes 1; that of freshness, 30, becomes 6.
        own(self, interval_seconds / 5, **options)

    IntervalDaemon.__init__ = with_shorter_waits  # type: ignore[method-assign]
    asset_daemon.MIN_INTERVAL_LOOP_SECONDS = sensor.MIN_INTERVAL_LOOP_TIME = SECONDS
    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = SECONDS


if __name__ == "__main__":
    look_often()
    main()
