"""MinHash of datatrove on the documents of `benchmarks.dedup`, which runs this file with a Python that has datatrove.

    PEER_PYTHON benchmarks/dedup_datatrove.py CORPUS OUT WORKERS

CORPUS holds 00000.jsonl, …; of these its own command line's steps are done: signatures, buckets, clusters, with its
default settings (5-grams, 14 buckets of 8 hashes). Filtering, which reads the documents once more, is left out. Prints
JSON: seconds by the clock and of the processor (children included), and [file, row, file, row] of every document that
would be removed and the one of its cluster that would be kept.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path


def main() -> None:
    corpus, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader

    config, files = MinhashConfig(), len(list(corpus.glob("*.jsonl")))
    signatures, buckets, clusters = (str(out / name) for name in ("signatures", "buckets", "clusters"))
    stages = [
        (files, [JsonlReader(str(corpus), glob_pattern="*.jsonl"), MinhashDedupSignature(signatures, config)]),
        (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        (1, [MinhashDedupCluster(buckets, clusters, config, save_cluster_id=True)]),
    ]
    started, before = time.perf_counter(), sum(os.times()[:4])
    for number, (tasks, pipeline) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline,
            tasks=tasks,
            workers=min(workers, tasks),
            logging_dir=str(out / f"logs{number}"),
            skip_completed=False,
        ).run()
    seconds, processor = time.perf_counter() - started, sum(os.times()[:4]) - before
    removed, members = set(), {}
    for path in Path(clusters).glob("*.remove"):
        removed |= {(int(path.stem), row) for (row,) in struct.iter_unpack("<I", path.read_bytes())}
    for path in Path(clusters).glob("*.clusters"):
        for row, cluster in struct.iter_unpack("<2I", path.read_bytes()):
            members[int(path.stem), row] = cluster
    kept = {cluster: place for place, cluster in members.items() if place not in removed}
    pairs = [[*place, *kept[members[place]]] for place in sorted(removed)]
    print(json.dumps({"seconds": seconds, "processor": processor, "dropped": pairs}))


if __name__ == "__main__":
    main()
