"""Planted secrets and a hostile corpus: what of them arrives on disk, in the terminal and in a browser.

Documents, ids, addresses and file names hold markup that would run, load or lead elsewhere; the judge repeats what it
was sent; the corpus and the hub refuse. A trap server tells what was fetched.
"""

import base64
import contextlib
import json
import re
import sqlite3
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import polars as pl
import psutil
import pytest

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.report.audit import page_problems
from sbp_assets.report.page import render
from sbp_assets.settings import ConceptsSource
from sbp_assets_tests.operations.deployment import PLANTED, Deployment, free_port, wait_for
from sbp_assets_tests.report.example_report import report_inputs

CHROMIUM = Path("/usr/bin/chromium")
# In a URL, in a setting that does not exist, in one that cannot be read: places that are refused, with a reason.
TYPED = "planted0typed0in0a0wrong0place"
# Run, load from $TRAP, or lead there; each without white space, so that it is one word of a document.
PAYLOADS = (
    "<script>window.ran=1</script>",
    '<img/src="$TRAP/img"/onerror="window.ran=1">',
    "</script></pre></td><svg/onload=window.ran=1>",
    "![](//$HOST/markdown)",
    "[click](javascript:window.ran=1)",
    "|`</code>|<iframe/src=$TRAP/frame>|",
    "&lt;img/src=$TRAP/entity&gt;&#60;script&#62;window.ran=1&#60;/script&#62;",
    '"><a/href="javascript:window.ran=1"/autofocus/onfocus=window.ran=1>x</a>',
    "$TRAP/bare",
    "![x][r]\u202e\u200b\x1b]0;ran\x07\x9b31m[r]:$TRAP/reference",
    "<style>@import'$TRAP/style';*{background:url($TRAP/background)}</style>",
)


class Trap(BaseHTTPRequestHandler):
    """Counts what is fetched; /corpus refuses, /v1 is a judge that repeats the key it was given, and markup."""

    fetched: list[str]
    given: list[str]

    def do_GET(self) -> None:
        self.given.append(str(self.headers))
        if self.path.startswith("/corpus"):
            return self._answer(401, f"refused: {self.headers}".encode())
        self.fetched.append(self.path)
        return self._answer(200, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.given.append(str(self.headers))
        content = f"{self.headers['Authorization']} {PAYLOADS[1]}\nVerdict: RELATED"
        body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
        self._answer(200, json.dumps(body).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def trap() -> Iterator[ThreadingHTTPServer]:
    handler = type("Here", (Trap,), {"fetched": [], "given": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def address(trap: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{trap.server_port}"


def payload(number: int, trap: ThreadingHTTPServer) -> str:
    host = f"127.0.0.1:{trap.server_port}"
    return PAYLOADS[number % len(PAYLOADS)].replace("$TRAP", f"http://{host}").replace("$HOST", host)


def write_corpus(folder: Path, trap: ThreadingHTTPServer) -> None:
    """Documents of the tiny profile's kind, each with markup in its text, every eleventh also in what names it."""
    folder.mkdir()
    world = ConceptWorld(ConceptsSource(documents=400, concepts=12, attributes=4, facts_per_document=2))
    rows = []
    for number in range(400):
        mark = payload(number, trap)
        row = {**world.document(number), "text": f"{mark} {world.document(number)['text']}"}
        if number % 11 == 0:
            row |= {"id": f"{mark}{number}", "url": f"javascript:{mark}", "source": mark}
        rows.append(json.dumps(row))
    for part in range(2):
        # Rejected, and shown where rejected rows are.
        broken = [payload(number, trap) for number in range(part, len(PAYLOADS), 2)] + ['{"text": null}']
        name = f"part-{part}<img src=x onerror=window.ran=1>\x1b[31m`|.jsonl"
        (folder / name).write_text("\n".join([*broken, *rows[part::2]]))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, trap: ThreadingHTTPServer) -> Iterator[Deployment]:
    """Deployment in which `sbp run -p tiny` has read, compared and paired a hostile corpus."""
    home = tmp_path_factory.mktemp("hostile")
    write_corpus(home / "corpus", trap)
    for folder in ("user", "temporary"):
        (home / folder).mkdir()
    overrides = {
        **PLANTED,
        "FSSPEC_HTTP": json.dumps({"client_kwargs": {"headers": {"Authorization": PLANTED["HF_TOKEN"]}}}),
        "SBP_EXPERIMENT__CORPUS__SOURCE": json.dumps({"kind": "files", "path": str(home / "corpus")}),
        # Whatever is written beside the deployment's folders is to be found, too.
        "HOME": str(home / "user"),
        "TMPDIR": str(home / "temporary"),
    }
    with Deployment(home, overrides) as deployment:
        say(deployment, "run", "--until", "pair")
        assert (deployment.artifacts / "pairing/neighbor_pairs/00001.parquet").is_file(), deployment.log("said.log")
        yield deployment


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, finished: Path, trap: ThreadingHTTPServer) -> Iterator[Deployment]:
    """Deployment of the finished store to which a judge has been added, with its verdicts and their downstream."""
    judge = {
        "SBP_EXPERIMENT__SYNTHESIS__JUDGE": '{"model": "echo", "documents": 4}',
        "SBP_DEPLOYMENT__JUDGE_URL": f"{address(trap)}/v1",
        "SBP_DEPLOYMENT__JUDGE_RETRIES": "0",
    }
    with Deployment(tmp_path_factory.mktemp("judged"), {**PLANTED, **judge}, finished) as deployment:
        assert "report:" in say(deployment, "run")
        yield deployment


def say(deployment: Deployment, *arguments: str, **overrides: str) -> str:
    """What `sbp ARGUMENTS` printed, kept among what is searched; it may fail."""
    before, deployment.overrides = deployment.overrides, deployment.overrides | overrides
    # FSSPEC_…, HOME and TMPDIR are read when modules are imported.
    done = deployment.sbp(*arguments, check=False, fresh=True)
    deployment.overrides = before
    with (deployment.home / "said.log").open("a") as log:
        log.write(done.stdout + done.stderr)
    return done.stdout + done.stderr


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file and, of databases and tables, those of every value: compressed or split over pages there."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield json.dumps(pl.read_parquet(path, glob=False).to_dicts(), default=str).encode()
    if path.suffix == ".db":
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in database.execute(f'select * from "{table}"'):
                    for value in row:
                        yield str(value).encode()
                        with contextlib.suppress(zlib.error):
                            yield zlib.decompress(value) if isinstance(value, bytes) else b""


def leaks(home: Path) -> set[str]:
    """(variable) in (file) wherever a planted secret stands below `home`, as it is or in base64."""
    secrets = {name: value.encode() for name, value in {**PLANTED, "typed": TYPED}.items()}
    shapes = {name: (value, base64.b64encode(value).rstrip(b"=")[:-1]) for name, value in secrets.items()}
    return {
        f"{name} in {path.relative_to(home)}"
        for path in home.rglob("*")
        if path.is_file()
        for part in contents(path)
        for name, needles in shapes.items()
        if any(needle in part for needle in needles)
    }


def test_no_secret_is_written_by_a_whole_run(finished: Path, judged: Deployment, trap: ThreadingHTTPServer) -> None:
    assert (finished / "said.log").is_file(), "its fixture did not materialise the finished store"
    assert leaks(finished) == set()
    assert leaks(judged.home) == set()
    # The judge was given its key, and repeated it.
    assert PLANTED["SBP_JUDGE_API_KEY"] in "".join(trap.RequestHandlerClass.given)  # type: ignore[attr-defined]
    answers = pl.read_parquet(judged.artifacts / "synthesis/judgements.parquet")["answer"]
    assert answers.str.contains("$SBP_JUDGE_API_KEY", literal=True).any()


def test_errors_and_prints_repeat_no_secret(hostile: Deployment, trap: ThreadingHTTPServer) -> None:
    def refused(says: str, **overrides: str) -> None:
        assert says in say(hostile, "run", "--refresh", "--until", "manifest", **overrides)

    corpus = f"{address(trap)}/corpus/part.jsonl"
    source = {"SBP_EXPERIMENT__CORPUS__SOURCE": json.dumps({"kind": "files", "path": corpus})}
    refused("Find source files failed", **source)
    assert PLANTED["HF_TOKEN"] in "".join(trap.RequestHandlerClass.given)  # type: ignore[attr-defined]
    refused("cannot be looked up", SBP_EXPERIMENT__CORPUS__SOURCE='{"kind": "hub", "name": "nobody/nothing"}')
    for path in (
        f"http://user:{TYPED}@127.0.0.1/a.jsonl", f"{corpus}?token={TYPED}", f"zip://*.jsonl::s3://k:{TYPED}@b/a.zip"
    ):  # fmt: skip
        refused("credentials are given", SBP_EXPERIMENT__CORPUS__SOURCE__PATH=path)
    refused("SBP_POSTGRES_URL cannot be used", SBP_POSTGRES_URL=f"postgresql://me:{TYPED}@127.0.0.1:1/dagster")
    refused("SBP_POSTGRES_URL is no postgresql://", SBP_POSTGRES_URL=f"postgresql://me:a@{TYPED}@127.0.0.1:1/dagster")
    refused("judge_api_key (from SBP_DEPLOYMENT__JUDGE_API_KEY)", SBP_DEPLOYMENT__JUDGE_API_KEY=TYPED)
    refused("not JSON", SBP_EXPERIMENT__PRETRAINING__SEEDS=f"[{TYPED}")
    for command in ("plan", "env"):
        assert "tiny" in say(hostile, command)
    assert leaks(hostile.home) == set()

    # The search finds what is there: in a table, in a database's row that is longer than a page.
    with hostile.instance() as instance:
        control = dg.AssetMaterialization("control", metadata={"long": "x" * 9000 + TYPED})
        instance.report_runless_asset_event(control)
    table = hostile.home / "control.parquet"
    pl.DataFrame({"text": [PLANTED["HF_TOKEN"]] * 100}).write_parquet(table)
    assert {leak.split(" in ")[0] for leak in leaks(hostile.home)} == {"typed", "HF_TOKEN"}
    table.unlink()


def test_a_document_steers_no_terminal(hostile: Deployment) -> None:
    raw = pl.read_parquet(hostile.artifacts / "corpus/raw_documents/00000.parquet")
    name = raw.filter(pl.col("text").str.contains("\x1b"))["id"][0]
    assert "]0;ran" in say(hostile, "trace", name)
    # A file's name in an error.
    (hostile.home / "corpus" / "torn\x1b[31m.jsonl.zst").write_bytes(b"no archive")
    assert "torn" in say(hostile, "run", "--refresh", "--until", "ingest")
    said = (hostile.home / "said.log").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)


@pytest.fixture(scope="module")
def ui(hostile: Deployment) -> Iterator[psutil.Process]:
    """`sbp ui` on the hostile deployment, as a user starts it."""
    hostile.port = free_port()
    process = hostile.start(sys.executable, "-m", "sbp_assets.cli", "ui", "--port", str(hostile.port), log="ui.log")
    hostile.wait_served(process, "ui.log")
    yield psutil.Process(process.pid)
    hostile.stop(process)


def test_the_ui_listens_on_loopback_alone(hostile: Deployment, ui: psutil.Process) -> None:
    listening = [
        connection.laddr
        for process in (ui, *ui.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert hostile.port in {place.port for place in listening}
    assert {place.ip for place in listening} <= {"127.0.0.1", "::1"}


class Browser:
    """A page of real Chromium that notes what it was made to do."""

    def __init__(self, page, own: str) -> None:
        self.page, self.asked, self.did = page, [], []
        page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else self.asked.append(r.url))
        page.on("dialog", lambda dialog: (self.did.append("dialog"), dialog.dismiss()))
        page.on("popup", lambda popup: self.did.append(f"popup {popup.url}"))

    def found(self) -> list[str]:
        """Everything that was loaded from elsewhere or ran."""
        ran = self.page.evaluate("window.ran")
        return [*self.asked, *self.did, *(["a script"] if ran is not None else [])]


@pytest.fixture
def browser() -> Iterator[Callable[[str], Browser]]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM}")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield lambda own: Browser(chromium.new_page(viewport={"width": 1400, "height": 1000}), own)
        chromium.close()


def previews(deployment: Deployment) -> dict[str, str]:
    """Every markdown text that assets and checks of the deployment recorded, by where."""
    found: dict[str, str] = {}
    with deployment.instance() as instance:
        for run in instance.get_runs():
            for entry in instance.all_logs(run.run_id):
                event = entry.dagster_event
                if event and event.is_step_materialization:
                    source = event.step_materialization_data.materialization
                elif event and event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
                    source = event.asset_check_evaluation_data
                else:
                    continue
                for name, value in source.metadata.items():
                    if isinstance(value, dg.MarkdownMetadataValue) and value.value:
                        found[f"{source.asset_key.to_user_string()} {name}"] = value.value
    return found


def test_previews_of_documents_run_and_load_nothing_in_the_ui(
    hostile: Deployment, judged: Deployment, ui: psutil.Process, trap: ThreadingHTTPServer, browser
) -> None:
    shown = previews(hostile) | {
        name: text for name, text in previews(judged).items() if "judgements" in name or "synthetic" in name
    }
    assert {"corpus/raw_documents preview", "corpus/rejected_rows preview", "pairing/neighbor_pairs preview"} <= set(
        shown
    )
    assert "synthesis/judgements preview" in shown
    with hostile.instance() as instance:
        # All previews on one page, as Dagster shows each on its asset's.
        gallery = {name: dg.MetadataValue.md(text) for name, text in shown.items()}
        instance.report_runless_asset_event(dg.AssetMaterialization("gallery", metadata=gallery))
        bare = dg.MetadataValue.md(f"![]({address(trap)}/control)")
        instance.report_runless_asset_event(dg.AssetMaterialization("bare", metadata={"image": bare}))
    window = browser(hostile.url)
    page = window.page
    page.set_default_timeout(120_000)

    page.goto(f"{hostile.url}/assets/corpus/raw_documents?view=partitions&partition=00000")
    page.get_by_text("Show markdown").first.click()
    # What a document holds is there to be read, as text.
    page.get_by_text("<script>window.ran=1</script>").first.wait_for()
    page.get_by_role("button", name="Close").click()

    page.goto(f"{hostile.url}/assets/gallery?view=events")
    page.get_by_text("pairing/neighbor_pairs preview").wait_for()
    opened = 0
    for button in page.get_by_text("Show markdown").all():
        button.click()
        dialog = page.get_by_role("dialog")
        dialog.locator("table").first.wait_for()
        assert dialog.locator("a, img, iframe, script, style, svg[onload]").count() == 0
        page.get_by_role("button", name="Close").click()
        dialog.wait_for(state="detached")
        opened += 1
    assert opened >= 4
    assert window.found() == [] and trap.RequestHandlerClass.fetched == []  # type: ignore[attr-defined]

    # Unescaped, Dagster's page would have fetched it.
    page.goto(f"{hostile.url}/assets/bare?view=events")
    wait_for(lambda: trap.RequestHandlerClass.fetched, "the control")  # type: ignore[attr-defined]
    assert window.found() == [f"{address(trap)}/control"]


def test_the_report_runs_and_loads_nothing(tmp_path: Path, trap: ThreadingHTTPServer, browser) -> None:
    marks = [payload(number, trap) for number in range(len(PAYLOADS))]
    text = " ".join(marks)
    page = render(**report_inputs(text))
    assert page_problems(page) == []
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
    assert policy is not None
    trap.RequestHandlerClass.fetched.clear()  # type: ignore[attr-defined]
    # With and without its policy: each of the two ways in which it is safe.
    for name, html in {"page.html": page, "without.html": page.replace(policy[0], "")}.items():
        (tmp_path / name).write_text(html, encoding="utf-8")
        window = browser("file://")
        window.page.goto((tmp_path / name).as_uri(), wait_until="networkidle")
        assert window.page.locator("#samples").get_by_text(marks[0]).count() > 0
        assert window.page.locator("main a").count() == 0
        assert window.found() == []
    # The policy by itself stops what is not escaped; without it the same page would run and load.
    for name, html in {"raw.html": page, "control.html": page.replace(policy[0], "")}.items():
        (tmp_path / name).write_text(html.replace("<main>", f"<main>{text}"), encoding="utf-8")
        window = browser("file://")
        window.page.goto((tmp_path / name).as_uri(), wait_until="networkidle")
        assert window.page.evaluate("window.ran") == (None if name == "raw.html" else 1)
        assert bool(trap.RequestHandlerClass.fetched) == (name == "control.html")  # type: ignore[attr-defined]
