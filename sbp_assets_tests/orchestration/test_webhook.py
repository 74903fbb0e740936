"""Failed runs are reported to a real HTTP server on loopback, by the sensor and by the plain module behind it."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sbp_assets.orchestration import webhook
from sbp_assets.orchestration.sensors import failure_sensor
from sbp_assets.settings import Deployment

SECRET = "T0-SECRET"


class Webhook:
    """A server on loopback that answers with `codes` in turn, then 200; its URL ends in SECRET."""

    def __init__(self, *codes: int) -> None:
        self.received: list[dict[str, Any]] = []
        self.requests = 0
        answers = iter(codes)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests += 1
                code = next(answers, 200)
                if code == 200:
                    outer.received.append(body)
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", outer.url)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/services/{SECRET}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    hook = Webhook()
    monkeypatch.setenv(webhook.URL_VARIABLE, hook.url)
    yield hook
    hook.close()


def fail_a_run(message: str) -> dg.RunFailureSensorContext:
    @dg.asset(key=["corpus", "rows"], partitions_def=dg.StaticPartitionsDefinition(["00007"]))
    def rows():
        try:
            raise ValueError(message)
        except ValueError as error:
            raise RuntimeError(f"file-7.jsonl: {message}") from error

    job = dg.define_asset_job("ingest", [rows.key])
    defs = dg.Definitions(assets=[rows], jobs=[job])
    instance = dg.DagsterInstance.ephemeral()
    result = defs.resolve_job_def("ingest").execute_in_process(
        instance=instance, partition_key="00007", raise_on_error=False
    )
    return dg.build_run_status_sensor_context(
        sensor_name="failed_runs",
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        dagster_event=next(event for event in result.all_events if event.is_run_failure),
    ).for_run_failure()


def test_a_failed_run_is_reported_to_the_webhook(server: Webhook):
    context = fail_a_run("two\nlines and <!channel>")
    sensor = failure_sensor(Deployment(webserver_url="https://dagster.example/"))
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    sensor(context)
    (body,) = server.received
    run = context.dagster_run
    assert body == {
        "run_id": run.run_id,
        "job": "ingest",
        "partition": "00007",
        "step": "corpus__rows",
        "error": "RuntimeError: file-7.jsonl: two\nlines and <!channel>",
        "url": f"https://dagster.example/runs/{run.run_id}",
        "text": "Run failed: ingest 00007 in corpus__rows\n"
        "RuntimeError: file-7.jsonl: two\nlines and &lt;!channel&gt;\n"
        f"https://dagster.example/runs/{run.run_id}",
    }


def test_the_sensor_is_off_and_silent_without_a_webhook(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(webhook.URL_VARIABLE, raising=False)
    sensor = failure_sensor(Deployment())
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    assert isinstance(sensor(fail_a_run("no")), dg.SkipReason)


def test_a_webhook_that_is_down_breaks_nothing_and_its_url_is_in_no_log(
    server: Webhook, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    context = fail_a_run(f"could not reach {server.url}")
    server.close()
    with caplog.at_level(logging.DEBUG):
        failure_sensor(Deployment())(context)
    written = caplog.text + "".join(capfd.readouterr())
    assert context.dagster_run.run_id in written
    assert SECRET not in written.replace(f"could not reach {server.url}", "")  # what the run itself has logged


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "FIRST_WAIT_SECONDS", 0.01)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("codes", "requests", "reason"),
    [
        ((), 1, ""),
        ((204,), 1, ""),
        ((503, 429), 3, ""),
        ((500,) * 3, 3, "it answered 500, 3 times"),
        ((404,), 1, "it answered 404"),
        ((302,), 1, "it answered 302"),
    ],
)
def test_a_message_is_sent_again_when_that_can_help(codes: tuple[int, ...], requests: int, reason: str):
    hook = Webhook(*codes)
    assert webhook.post(hook.url, {"text": "é"}) == reason
    assert hook.requests == requests
    assert hook.received == ([] if reason or 204 in codes else [{"text": "é"}])
    hook.close()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("codes", [(), (500,) * 3, (404,)])
def test_the_url_is_in_no_log_of_the_http_client(codes: tuple[int, ...], caplog: pytest.LogCaptureFixture):
    hook = Webhook(*codes)
    before = logging.getLogger("httpx").filters[:]
    with caplog.at_level(logging.DEBUG):
        webhook.post(hook.url, {})
        logging.getLogger("httpx").info("another client's request")
    assert "another client's request" in caplog.text
    assert SECRET not in caplog.text
    assert logging.getLogger("httpx").filters == before
    hook.close()


def test_only_http_is_posted_to(tmp_path: Path):
    assert webhook.post(f"file://{tmp_path}/x", {}) == "$SBP_WEBHOOK_URL is no http or https URL"


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("url", [f"http://no such host/{SECRET}", f"http://[::1/{SECRET}", f"http://x:port/{SECRET}"])
def test_a_malformed_url_is_reported_without_showing_it(url: str):
    reason = webhook.post(url, {})
    assert reason and SECRET not in reason


def test_a_malformed_proxy_fails_no_sensor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "nonsense://proxy")
    assert webhook.post(f"http://hooks.example/{SECRET}", {}) == "ValueError"


@pytest.mark.usefixtures("no_waiting")
def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # accepts, and is never served
        assert webhook.post(f"http://127.0.0.1:{silent.server_port}/", {}) == "ReadTimeout, 3 times"


@pytest.mark.parametrize("status", [200, 404])
def test_the_body_of_an_answer_is_not_read(status: int):
    """The server goes on sending until the client hangs up."""
    hung_up = threading.Event()

    class Endless(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 2**16)
            except ConnectionError:
                hung_up.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reason = webhook.post(f"http://127.0.0.1:{server.server_port}/", {})
        assert reason == ("" if status == 200 else "it answered 404")
        assert hung_up.wait(10)
        server.shutdown()


def test_a_long_error_is_cut():
    message = webhook.failure_message("r", "ingest", None, None, "x" * 10_000 + "\n" * 50, "u")
    assert len(message["error"] or "") == webhook.ERROR_CHARS
