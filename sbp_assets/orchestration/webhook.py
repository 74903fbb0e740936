"""Report a failed run to a webhook. Plain code: no dagster.

The webhook's URL comes from $SBP_WEBHOOK_URL alone: whoever has such a URL can post to it, so it is in no setting, log,
message or exception.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

URL_VARIABLE = "SBP_WEBHOOK_URL"
# One tick of the sensor may report several runs, and Dagster gives it a minute.
ATTEMPTS = 3
TIMEOUT_SECONDS = 3.0
FIRST_WAIT_SECONDS = 0.5
ERROR_LINES, ERROR_CHARS = 10, 1500


def failure_message(
    run_id: str, job: str, partition: str | None, step: str | None, error: str, url: str
) -> dict[str, str | None]:
    """Return the body of a message: the fields given, `error` cut to its beginning, and `text`, which Slack shows."""
    lines = error.strip().splitlines()
    beginning = "\n".join(lines[:ERROR_LINES])[:ERROR_CHARS]
    where = " ".join(filter(None, (job, partition)))
    # Slack's own escapes: what failed may quote the corpus, which must not address people or hide a link.
    quoted = beginning.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {
        "run_id": run_id,
        "job": job,
        "partition": partition,
        "step": step,
        "error": beginning,
        "url": url,
        "text": f"Run failed: {where}" + (f" in {step}" if step else "") + f"\n{quoted}\n{url}",
    }


def post(url: str, body: Mapping[str, Any]) -> str:
    """POST `body` as JSON; return '' when a 2xx status answers, else the reason without the URL. Never raises.

    Statuses 429 and 5xx and failed connections are tried ATTEMPTS times, with doubling waits.
    """
    if not url.lower().startswith(("http://", "https://")):
        return f"${URL_VARIABLE} is no http or https URL"
    # Imported here: httpx takes 0.2 s to import, and the process of every run imports the sensors.
    import httpx

    def may_pass(error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.is_server_error or error.response.status_code == httpx.codes.TOO_MANY_REQUESTS
        return isinstance(error, httpx.TransportError)

    attempts = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT_SECONDS),
        reraise=True,
    )

    def post_once(target: httpx.URL) -> None:
        # Certificates are the system's, as urllib has them; httpx would take certifi's. Redirects are not followed, and
        # the answer's body is not read.
        with (
            httpx.Client(timeout=TIMEOUT_SECONDS, verify=ssl.create_default_context()) as client,
            client.stream("POST", target, json=body) as response,
        ):
            response.raise_for_status()

    try:
        target = httpx.URL(url)
        with _kept_out_of_logs(str(target)):
            attempts(post_once, target)
    except Exception as error:
        # Whatever fails here, a malformed URL of a proxy, say, must not fail the sensor, and its text may hold the URL.
        if isinstance(error, httpx.HTTPStatusError):
            reason = f"it answered {error.response.status_code}"
        else:
            reason = type(error).__name__
        return f"{reason}, {ATTEMPTS} times" if may_pass(error) else reason
    return ""


@contextmanager
def _kept_out_of_logs(url: str) -> Iterator[None]:
    """Drop, for the block, what httpx logs at INFO of every request: its URL."""
    logger = logging.getLogger("httpx")

    def without_url(record: logging.LogRecord) -> bool:
        return url not in record.getMessage()

    logger.addFilter(without_url)
    try:
        yield
    finally:
        logger.removeFilter(without_url)
