"""Tell a webhook about a failed run. Plain code: no dagster.

The webhook's URL comes from $SBP_WEBHOOK_URL alone: whoever has such a URL can post to it, so it is in no setting, log,
message or exception.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

URL_VARIABLE = "SBP_WEBHOOK_URL"
# A tick of the sensor may tell of several runs, and Dagster gives it a minute.
ATTEMPTS = 3
TIMEOUT_SECONDS = 3.0
FIRST_WAIT_SECONDS = 0.5
ERROR_LINES, ERROR_CHARS = 10, 1500


def failure_message(
    run_id: str, job: str, partition: str | None, step: str | None, error: str, url: str
) -> dict[str, str | None]:
    """Body of the message: the fields given, `error` cut to its beginning, and `text`, which Slack shows."""
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
    """POST `body` as JSON, again after doubled waits where that fails; returns '' or why it failed, without the URL."""
    if not url.lower().startswith(("http://", "https://")):
        return f"${URL_VARIABLE} is no http or https URL"
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(
                url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            reason = f"it answered {error.code}"
            if error.code < 500 and error.code != 429:
                return reason  # it will answer the same again
        except (OSError, ValueError, http.client.HTTPException) as error:
            # Of these the text may hold the URL.
            cause = getattr(error, "reason", error)
            reason = type(cause).__name__
    return f"{reason}, {ATTEMPTS} times"
