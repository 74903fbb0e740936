"""The judge against a local server that answers, fails, hangs and talks nonsense as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.settings import Judge
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.endpoint import API_KEY, OpenAIEndpoint
from sbp_assets.synthesis.judge import GIVE_UP_AFTER, JUDGEMENT_SCHEMA, judge, judged_rows
from sbp_assets.synthesis.quality import REAL, SYNTHETIC
from sbp_assets.synthesis.questions import JudgeError, Question, questions

SETTINGS = Judge(model="small-judge", max_tokens=40)
KEY = "sk-very-secret-4711"
NOTHING = {"answer": None, "prompt_tokens": 0, "completion_tokens": 0}
# Two verdicts of three questions on syntheses; a further one is about a pair.
JUDGEMENTS = pl.DataFrame(
    [
        {"id": "a", "corpus": SYNTHETIC, "metric": "non_factual", "verdict": True, "unjudged": None, **NOTHING},
        {"id": "b", "corpus": SYNTHETIC, "metric": "non_factual", "verdict": False, "unjudged": None, **NOTHING},
        {"id": "c", "corpus": SYNTHETIC, "metric": "non_factual", "verdict": None, "unjudged": "timeout", **NOTHING},
        {"id": "a", "corpus": SYNTHETIC, "metric": "pair_irrelevance", "verdict": False, "unjudged": None, **NOTHING},
        {"id": "r", "corpus": REAL, "metric": "non_factual", "verdict": False, "unjudged": None, **NOTHING},
    ],
    schema=JUDGEMENT_SCHEMA,
)

Reply = tuple[int, dict[str, str], str]


def completion(content: str | None) -> Reply:
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    message = {"role": "assistant", "content": content}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(body)


def failure(status: int, **headers: str) -> Reply:
    return status, {"Content-Type": "application/json", **headers}, json.dumps({"error": {"message": f"key {KEY}"}})


FACTUAL = completion("All of it holds.\nVerdict: FACTUAL")
FALSE = completion("The sun is not cold.\n**Verdict:** NON-FACTUAL.")


class Server:
    """An OpenAI-compatible endpoint: `reply(prompt, n)` answers the n-th request (from 0) that holds that prompt."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        self.requests: list[tuple[float, str, dict]] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    seen = sum(earlier["messages"][0]["content"] == prompt for _, _, earlier in self.requests)
                    self.requests.append((time.monotonic(), handler.headers["Authorization"], body))
                status, headers, text = reply(prompt, seen)
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.end_headers()
                with suppress(BrokenPipeError):  # who timed out is gone
                    handler.wfile.write(text.encode())

            def log_message(handler, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(API_KEY, KEY + "\n")
    started: list[Server] = []

    def start(reply: Callable[[str, int], Reply]) -> Server:
        started.append(Server(reply))
        return started[-1]

    yield start
    for server in started:
        server.close()


def asked(*texts: str) -> list[Question]:
    frame = pl.DataFrame(
        {"id": [f"d{n}" for n in range(len(texts))], "text": texts}, schema_overrides={"id": pl.String}
    )
    return questions(pl.DataFrame(schema={"id": pl.String, "text": pl.String, "seed_text": pl.String}), frame, SETTINGS)


def ask(
    questions_: list[Question], url: str, ledger: Path, concurrency: int = 4, timeout: float = 20, retries: int = 2
) -> tuple[pl.DataFrame, dict[str, int | float]]:
    with Progress("test", "questions", len(questions_)) as progress:
        found = judge(questions_, SETTINGS, OpenAIEndpoint(url, concurrency, timeout, retries), ledger, progress)
    assert progress.done == len(questions_)
    return found


def test_answers_are_counted_with_their_cost_and_kept(serve: Callable, tmp_path: Path) -> None:
    server = serve(lambda prompt, n: FALSE if "cold" in prompt else FACTUAL)
    table, counts = ask(asked("The sun is cold.", "Water is wet.", "Salt is salty."), server.url, tmp_path / "l.jsonl")
    assert dict(table.schema) == JUDGEMENT_SCHEMA
    assert table["verdict"].to_list() == [True, False, False] and table["unjudged"].null_count() == 3
    assert table["answer"][0].startswith("The sun is not cold.")
    assert {name: counts[name] for name in ("judged", "unjudged", "resumed", "requests")} == {
        "judged": 3, "unjudged": 0, "resumed": 0, "requests": 3,
    }  # fmt: skip
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (300, 21) and counts["judge_seconds"] > 0
    assert {key for _, key, _ in server.requests} == {f"Bearer {KEY}"}
    body = server.requests[0][2]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small-judge", 40, 0)

    again, resumed = ask(asked("Water is wet.", "The sun is cold.", "New."), server.url, tmp_path / "l.jsonl")
    assert again["verdict"].to_list() == [False, True, False] and len(server.requests) == 4
    assert resumed["resumed"] == 2 and resumed["requests"] == 3 and resumed["prompt_tokens"] == 300
    rows = judged_rows(again)
    assert rows.filter(metric="non_factual", corpus=REAL)["value", "documents", "sample"].row(0) == (1 / 3, 3, 3)
    assert rows.filter(metric="non_factual", corpus=SYNTHETIC)["value"].item() is None


def test_failures_are_retried_and_rate_limits_waited_for(serve: Callable, tmp_path: Path) -> None:
    def reply(prompt: str, n: int) -> Reply:
        if "limited" in prompt and n == 0:
            return failure(429, **{"Retry-After": "1"})
        return failure(500) if "broken" in prompt and n == 0 else FACTUAL

    server = serve(reply)
    table, counts = ask(asked("limited", "broken", "fine"), server.url, tmp_path / "l.jsonl")
    assert table["verdict"].to_list() == [False] * 3
    assert counts["requests"] == len(server.requests) == 5
    first, second = (at for at, _, body in server.requests if "limited" in body["messages"][0]["content"])
    assert second - first >= 1, "Retry-After is honoured"


def test_what_has_no_verdict_is_unjudged_with_its_reason(
    serve: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def reply(prompt: str, n: int) -> Reply:
        if "hangs" in prompt:
            release.wait(20)
        if "stubborn" in prompt or ("confused" in prompt and n == 0):
            return completion("Bananas.")
        return {
            "refused": failure(401), "broken": failure(503), "empty": completion(None),
            "html": (200, {"Content-Type": "text/html"}, "<html>welcome</html>"),
            "list": (200, {"Content-Type": "application/json"}, "[1, 2]"),
        }.get(prompt.split("=\n")[1].split("\n")[0].strip(), FACTUAL)  # fmt: skip

    server = serve(reply)
    texts = ["hangs", "stubborn", "confused", "refused", "broken", "empty", "html", "list", "fine"]
    began = time.monotonic()
    table, counts = ask(asked(*texts), server.url, tmp_path / "l.jsonl", concurrency=9, timeout=1.0, retries=1)
    release.set()
    assert time.monotonic() - began < 10
    assert dict(zip(texts, table["unjudged"], strict=True)) == {
        "hangs": "timeout", "stubborn": "unparseable", "confused": None, "refused": "http_401", "broken": "http_503",
        "empty": "unparseable", "html": "unparseable", "list": "unparseable", "fine": None,
    }  # fmt: skip
    assert table["verdict"].to_list() == [None, None, False, None, None, None, None, None, False]
    assert (counts["judged"], counts["unjudged"], counts["unjudged_unparseable"]) == (2, 7, 4)
    asked_for: dict[str, list[dict]] = {text: [] for text in texts}
    for _, _, body in server.requests:
        asked_for[body["messages"][0]["content"].split("=\n")[1].split("\n")[0]].append(body)
    assert [len(asked_for[text]) for text in texts] == [2, 3, 2, 1, 2, 3, 3, 3, 1]
    assert "Verdict: NON_FACTUAL" in asked_for["confused"][1]["messages"][2]["content"], "it is told what is wanted"
    # What did not parse was paid for all the same.
    assert table["prompt_tokens"].to_list() == [0, 300, 200, 0, 0, 300, 0, 0, 100]
    assert counts["prompt_tokens"] == 900 and counts["requests"] == len(server.requests)
    rows = judged_rows(table)
    assert rows.filter(metric="non_factual", corpus=REAL)["value", "documents", "sample"].row(0) == (0, 2, 9)
    written = (tmp_path / "l.jsonl").read_text() + str(table.rows()) + str(counts) + caplog.text
    assert KEY not in written, "the key goes nowhere but to the endpoint"


def test_an_endpoint_that_is_down_is_given_up_and_asked_again_by_the_next_run(
    serve: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(lambda prompt, n: FACTUAL)
    server.close()
    many = asked(*(f"document {n}" for n in range(40)))
    ledger = tmp_path / "l.jsonl"
    table, counts = ask(many, server.url, ledger, retries=0)
    assert counts["judged"] == 0 and table["verdict"].null_count() == 40
    assert GIVE_UP_AFTER <= counts["unjudged_connection"] < 40
    assert counts["unjudged_connection"] + counts["unjudged_not_asked"] == 40
    assert "did not answer 10 questions in a row (connection)" in caplog.text
    assert judged_rows(table).filter(corpus=REAL, metric="non_factual")["value"].item() is None

    up = serve(lambda prompt, n: FACTUAL)
    table, counts = ask(many, up.url, ledger)
    assert counts["judged"] == 40 and counts["resumed"] == 0 and len(up.requests) == 40


def test_a_stopped_run_goes_on_and_a_torn_line_is_asked_again(serve: Callable, tmp_path: Path) -> None:
    many, ledger = asked(*(f"document {n}" for n in range(12))), tmp_path / "l.jsonl"
    server = serve(lambda prompt, n: FACTUAL)

    class Killed(BaseException):
        pass

    class Stopping(Progress):
        def advance(self, count: int = 1, note: str = "") -> None:
            super().advance(count, note)
            if self.done == 5:
                raise Killed

    with pytest.raises(Killed), Stopping("test", "questions") as progress:
        judge(many, SETTINGS, OpenAIEndpoint(server.url, 1, 20, 0), ledger, progress)
    whole = ledger.read_text().splitlines()
    assert len(whole) == 5
    ledger.write_text("\n".join(whole[:4]) + "\n" + whole[4][:30])
    before = len(server.requests)
    table, counts = ask(many, server.url, ledger)
    assert counts["resumed"] == 4 and counts["judged"] == 12
    assert len(server.requests) - before <= 8 + 1, "one may have been under way"
    third, final = ask(many, server.url, ledger)
    assert final["resumed"] == 12 and third.equals(table)


def test_a_key_that_no_header_can_carry_is_refused_without_being_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(API_KEY, "sk-schlüssel")
    with pytest.raises(JudgeError) as refused:
        ask(asked("x"), "http://127.0.0.1:9/v1", tmp_path / "l.jsonl")
    assert API_KEY in str(refused.value) and "schl" not in str(refused.value)
