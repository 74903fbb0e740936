"""The judge against a real vLLM server."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.endpoint import OpenAIEndpoint
from sbp_assets.synthesis.engine import CPU_KV_CACHE_GIB
from sbp_assets.synthesis.judge import judge
from sbp_assets_tests.synthesis.conftest import CONTEXT
from sbp_assets_tests.synthesis.test_judge import SETTINGS, ask, asked


@pytest.fixture
def vllm_server(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`vllm serve` as its module, on the model of random weights: it answers, in noise. Starting takes some 20 s."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Of the question only its end is put before the model, whose context is short; the server counts what it is given.
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'][-24:] }}")
    options = {
        "model": checkpoint, "served-model-name": SETTINGS.model, "host": "127.0.0.1", "port": port,
        "dtype": "float32", "max-model-len": CONTEXT, "max-num-seqs": 8, "chat-template": template,
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE_GIB, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.processes
def test_a_real_vllm_server_is_asked_and_its_tokens_are_counted(vllm_server: str, tmp_path: Path) -> None:
    """Random weights state no verdict: everything is unjudged, at a cost, and nothing is made up."""
    table, counts = ask(asked("one document", "another"), vllm_server, tmp_path / "l.jsonl", timeout=60)
    assert table["unjudged"].to_list() == ["unparseable"] * 2 and table["verdict"].null_count() == 2
    assert counts["requests"] == 6, "each is asked three times"
    # 24 bytes each time, a token a byte, and at most `max_tokens` of answer.
    assert table["prompt_tokens"].to_list() == [3 * 24] * 2
    assert 0 < counts["completion_tokens"] <= 6 * SETTINGS.max_tokens
    assert table["answer"].null_count() == 0
    wrong = SETTINGS.model_copy(update={"model": "another-model"})
    with Progress("test", "questions") as progress:
        endpoint = OpenAIEndpoint(vllm_server, 1, 60, 2)
        table, _ = judge(asked("one document"), wrong, endpoint, tmp_path / "w.jsonl", progress)
    assert table["unjudged"].to_list() == ["http_404"]
