"""The cache of local copies: its bound, and what other processes use of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbp_assets.storage.cache import Cache


def fill(size: int):
    return lambda path: path.write_bytes(b"x" * size)


def test_the_cache_is_bounded_but_keeps_what_is_in_use(tmp_path: Path):
    cache = Cache(tmp_path, limit=1000)
    first = [cache.get(f"a{number}", "file", fill(400)) for number in range(4)]
    assert all(path.exists() for path in first)  # one run's inputs, though too many
    for age, path in enumerate(first):
        os.utime(path.parent, (time.time() - age, time.time() - age))
    cache.release()
    assert [path.exists() for path in first] == [True, True, False, False]
    assert cache.get("a0", "file", lambda _: pytest.fail("it is there")) == first[0]


USER = """
import sys
from pathlib import Path
from sbp_assets.storage.cache import Cache
cache = Cache(Path(sys.argv[1]), 1000)
print(cache.get("theirs", "file", lambda path: path.write_bytes(b"x" * 800)), flush=True)
sys.stdin.read()
"""


def test_the_cache_keeps_what_another_living_process_uses(tmp_path: Path):
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None
    theirs = Path(user.stdout.readline().strip())
    os.utime(theirs.parent, (0, 0))
    cache = Cache(tmp_path, limit=1000)
    cache.get("mine", "file", fill(900))
    assert theirs.exists()
    user.kill()
    user.communicate()
    cache.get("more", "file", fill(100))
    assert not theirs.exists()


def test_what_nobody_has_asked_for_in_a_while_may_go(tmp_path: Path):
    assert Cache(tmp_path / "none", limit=1000).unused(0) == [] and not (tmp_path / "none").exists()
    cache = Cache(tmp_path, limit=1000)
    paths = {name: cache.get(name, "file", fill(10)) for name in ("old", "new")}
    assert cache.unused(0) == [], "this process uses them"
    cache.release()
    os.utime(paths["old"].parent, (time.time() - 60, time.time() - 60))
    assert cache.unused(30) == [paths["old"].parent]
    cache.get("old", "file", lambda _: pytest.fail("it is there"))
    cache.remove(paths["old"].parent)
    assert paths["old"].exists(), "asked for in the meantime"
    cache.release()
    cache.remove(paths["old"].parent)
    assert not paths["old"].exists() and paths["new"].exists()
