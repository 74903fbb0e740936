"""A driver that a test kills: `python -m sbp_assets_tests.cluster.driver ADDRESS FOLDER BLOCKS SHARDS SECONDS`."""

import json
import sys
from pathlib import Path

from sbp_assets.fan_out import PublishedFiles, open_engine
from sbp_assets.pairing.tasks import search_block
from sbp_assets_tests.fan_out import work
from sbp_assets_tests.pairing import stores
from sbp_assets_tests.tiny import tiny_settings


def main(address: str, folder: str, blocks: str, shards: str, seconds: str) -> None:
    engine = open_engine(tiny_settings(Path(folder), {"deployment.ray_address": address}))
    files = PublishedFiles(f"{folder}/partial", f"{folder}/cache")
    names = tuple(f"shard{n}" for n in range(int(shards)))
    tasks = [(f"block{n}", (f"block{n}", names, folder, files, float(seconds))) for n in range(int(blocks))]
    try:
        print(json.dumps(dict(engine.run(work.search_block, tasks))))
    finally:
        engine.close()


def search(address: str, data: str, made: str, shards: str, blocks: str, seconds: str) -> None:
    """Search the store in `data`; each table takes so many seconds."""
    engine = open_engine(tiny_settings(Path(made), {"deployment.ray_address": address}))
    tasks = stores.search_tasks(Path(data), Path(made), int(shards), int(blocks), float(seconds))
    try:
        dict(engine.run(search_block, tasks.items(), memory=5 * 10**8))
    finally:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
