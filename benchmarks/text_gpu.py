"""SBP and its placebos on real text with a model of 40M parameters, on a GPU: python -m benchmarks.text_gpu.

`export` writes what is needed of a store that is finished up to `pair` into one folder: the settings, the tokenizer,
the tokens and the pairs. `run` reads that folder alone and needs neither Dagster nor the store:

    SBP_PROFILE=… sbp run --until pair
    SBP_PROFILE=… python -m benchmarks.text_gpu export DATA
    python -m benchmarks.text_gpu run DATA RESULTS.jsonl

In this order, with the project's own modules for data, training and sampling:

- the baseline at each of --weight-decays, of which the one with the lowest held-out loss serves all that follows
- the oracle
- SBP: a synthesizer tuned on the pairs, its documents, and an arm trained on them and D
- the unconditional placebo: documents sampled after <bos> alone from the weights that the synthesizer starts from
- the random-pairs placebo: as SBP, on the same documents in pairs dealt at random
- SBP with a synthesizer that starts from the baseline's other weights (last, or of the lowest held-out loss)

Of each arm the perplexity of held-out documents, and the share of the oracle's gain with a 95% interval (bootstrap over
the documents; one training seed, so that it does not hold the luck of training or sampling); of synthetic documents,
how much is copied and how many keep to the subject of their seed (`benchmarks.text_measures`). Each result is a line of
RESULTS.jsonl as it comes. After --minutes the experiment ends, whatever is under way.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.arguments import parser
from benchmarks.deadline import ending_after
from benchmarks.machine import describe
from benchmarks.text_data import TINY, export, load, smaller
from benchmarks.text_measures import document_losses, novel_shares, perplexities, subject_kept
from sbp_assets.corpus.split import HELDOUT, UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.pretraining.budget import Arm, plan_arm
from sbp_assets.settings import Experiment, Optimizer
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesis import transformers_worker
from sbp_assets.synthesis.engine import CPU_KV_CACHE_GIB, EngineSpec, Request, Sampling
from sbp_assets.synthesis.generate import budget_prefix, request_order, sampling_seed, shard_budget
from sbp_assets.synthesizer.examples import HELDOUT as EXAMPLES_HELDOUT
from sbp_assets.synthesizer.examples import TRAIN, format_prompt, write_examples
from sbp_assets.training.checkpoint import best_model
from sbp_assets.training.device import Device, resolve_device
from sbp_assets.training.spec import ExamplesData, Source, TrainingSpec
from sbp_assets.training.worker import run as train

SHARD = "0"
FIRST_WAVE = 0.8  # of the budget, while the length of a synthetic document is a guess
MEASURED = 2000  # synthetic documents whose copying and subject are measured
SHOWN = 3  # synthetic documents that are printed beside their seeds


@dataclass(frozen=True)
class Given:
    """The data, the settings, and how they are computed."""

    data: Path
    experiment: Experiment
    work: Path
    device: Device
    compile: bool
    sequences: int  # sampled at a time, at most
    write: Callable[[dict[str, Any]], None]


class Study:
    """The models and synthetic corpora of one run, by name."""

    def __init__(self, given: Given) -> None:
        self.given, self.experiment = given, given.experiment
        self.tokenizer = load_tokenizer(given.data / "tokenizer")
        self.tokens = TokenArrays.load(given.data / "tokens")
        self.ids = self.tokens.documents["id"].to_list()
        self.splits = self.tokens.documents["split"].to_numpy()
        self.on_gpu = resolve_device(given.device) == "cuda"
        self.unique = {self.ids[i]: self.document(i) for i in np.flatnonzero(self.splits == UNIQUE)}
        self.losses: dict[str, np.ndarray] = {}
        self.weight_decay = self.experiment.pretraining.weight_decay

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of a document, `<bos>` and `<eos>` included."""
        return np.asarray(self.tokens.tokens[self.tokens.offsets[number] : self.tokens.offsets[number + 1]])

    def arm(self, name: str, arm: Arm, weight_decay: float | None = None, synthetic: Path | None = None) -> Path:
        """Train an arm, score it, and return its model directory."""
        section = self.experiment.pretraining
        decay = self.weight_decay if weight_decay is None else weight_decay
        tokens = {SHARD: self.given.data / "tokens"}
        plan = plan_arm(arm, section, tokens, None if synthetic is None else {SHARD: synthetic})
        spec = TrainingSpec(
            name=name,
            optimizer=_optimizer(section, weight_decay=decay),
            data=plan.data,
            steps=plan.steps,
            heldout=[Source(directory=self.given.data / "tokens", split=HELDOUT)],
            keep_best=arm == "baseline",
            **self._common(name),
        )
        train(spec)
        record = {"arm": name, "weight_decay": decay, "note": plan.note, **_run_record(spec.output_dir)}
        self._score(name, spec.output_dir, record)
        if (best := best_model(spec.output_dir)) != spec.output_dir:
            self._score(f"{name}_early_stopped", best, {"arm": f"{name}_early_stopped"})
        return spec.output_dir

    def tune(self, name: str, start: Path, partners_seed: int | None = None) -> Path:
        """Tune a synthesizer on the pairs, or with a seed on pairs dealt at random, and return its directory."""
        examples = self.given.work / f"{name}-examples"
        (scratch := self.given.work / f"{name}-joined").mkdir()
        counts = write_examples(
            examples,
            {SHARD: pl.scan_parquet(self.given.data / "pairs.parquet", glob=False)},
            {SHARD: self.given.data / "tokens"},
            related_id(self.tokenizer),
            self.experiment.max_document_tokens,
            len(self.tokenizer),
            scratch,
            "4GB",
            shuffle_seed=partners_seed,
        )
        epochs = self.experiment.synthesizer.epochs
        spec = TrainingSpec(
            name=name,
            optimizer=_optimizer(self.experiment.synthesizer),
            initial_model=start,
            data=ExamplesData(source=Source(directory=examples, split=TRAIN), epochs=epochs),
            heldout=[Source(directory=examples, split=EXAMPLES_HELDOUT)],
            **self._common(name),
        )
        train(spec)
        record = _run_record(spec.output_dir)
        self.given.write({"synthesizer": name, "pairs": counts["examples"], "epochs": epochs, **record})
        return spec.output_dir

    def synthesise(self, name: str, model: Path, conditional: bool = True) -> Path:
        """Sample a corpus of the SBP arm's synthetic share, measure it, and return its token arrays."""
        started = time.monotonic()
        section, cut = self.experiment.pretraining, self.experiment.max_document_tokens
        related = related_id(self.tokenizer)
        prompts = {
            id_: format_prompt(ids, related, cut) if conditional else [self.tokenizer.bos_token_id]
            for id_, ids in self.unique.items()
        }
        read = sum(map(len, self.unique.values()))
        budget = shard_budget(read, section.repetitions, section.synthetic_share)
        keys, documents, ends = self._sampled(model, prompts, budget, read / len(self.unique))
        seconds = time.monotonic() - started
        rows = pl.DataFrame({
            "id": [f"syn-{id_}-{rollout}" for id_, rollout in keys], "seed_id": [id_ for id_, _ in keys],
        })  # fmt: skip
        total = write_token_arrays(self.given.work / f"{name}-tokens", rows, documents, len(self.tokenizer))
        real, rows_of = list(self.unique.values()), {id_: row for row, id_ in enumerate(self.unique)}
        chosen = _evenly(len(documents), MEASURED)
        measured = [documents[i] for i in chosen]
        seeds = [rows_of[keys[i][0]] for i in chosen] if conditional else None
        result = {
            "syntheses": name, "documents": len(documents), "tokens": total, "ended_by_eos": ends,
            "seconds_to_sample": round(seconds, 1), "tokens_per_second": round(total / seconds),
            "novel": novel_shares(measured, real, seeds),
        }  # fmt: skip
        if seeds is not None:
            result["subject"] = subject_kept(measured, seeds, real, len(self.tokenizer))
        result["shown"] = [
            {
                "d1": self._text(self.unique[keys[i][0]]) if conditional else None,
                "synthetic": self._text(documents[i]),
            }
            for i in _evenly(len(documents), SHOWN)
        ]
        self.given.write(result)
        return self.given.work / f"{name}-tokens"

    def _sampled(
        self, model: Path, prompts: dict[str, list[int]], budget: int, expected: float
    ) -> tuple[list[tuple[str, int]], list[np.ndarray], float]:
        """Return the requests whose documents reach the budget, the documents' tokens, and the share that ended."""
        settings = self.experiment.synthesis
        spec = EngineSpec(
            "transformers", model, "", self.experiment.model.context_length, settings.dtype, self.given.device, 1,
            self.given.sequences, 0.8,
        )  # fmt: skip
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()  # the engine takes what is free
            # It plans its kernels once more for each shape, and here no two steps have the same.
            torch.backends.cuda.enable_cudnn_sdp(False)
        loaded = transformers_worker.load(spec, resolve_device(self.given.device))
        sampling = Sampling(float(settings.temperature), float(settings.top_p), self.tokenizer.eos_token_id)
        found: dict[tuple[str, int], np.ndarray] = {}
        ended: dict[tuple[str, int], bool] = {}
        order = request_order(prompts)
        while True:
            lengths = {key: len(document) if len(document) > 2 else 0 for key, document in found.items()}
            prefix, met = budget_prefix(prompts, lengths, budget)
            if met:
                break
            reached = sum(lengths.values())
            mean = max(1.0, reached / len(found)) if found else expected
            aim = 1.03 * (budget - reached) if found else FIRST_WAVE * budget
            keys = [next(order) for _ in range(math.ceil(aim / mean) + 1)]
            requests = [Request(*key, sampling_seed(settings.salt, *key), prompts[key[0]]) for key in keys]
            sampled = list(transformers_worker.sample(loaded, requests, sampling))
            texts = self.tokenizer.batch_decode(
                [ids for _, ids, _ in sampled], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            encoded = encode_documents(self.tokenizer, texts)
            for (request, _, reason), document in zip(sampled, encoded, strict=True):
                found[request.seed_id, request.rollout] = document
                ended[request.seed_id, request.rollout] = reason == "stop"
        kept = [key for key in prefix if len(found[key]) > 2]
        return kept, [found[key] for key in kept], sum(ended[key] for key in kept) / len(kept)

    def real_documents(self) -> None:
        """Measure of real documents what is measured of synthetic ones: held-out ones, and the d2 of pairs."""
        real, rows_of = list(self.unique.values()), {id_: row for row, id_ in enumerate(self.unique)}
        pairs = pl.read_parquet(self.given.data / "pairs.parquet", glob=False).select("d1", "d2").rows()
        pairs = [pairs[i] for i in _evenly(len(pairs), MEASURED)]
        partners, seeds = [self.unique[d2] for _, d2 in pairs], [rows_of[d1] for d1, _ in pairs]
        self.given.write({
            "real": "held-out documents, and d2 beside their d1",
            "tokens_of_documents": {
                split: [int(lengths.sum()), len(lengths)]
                for split in sorted(set(self.splits))
                for lengths in [self.tokens.lengths[self.splits == split]]
            },
            "novel": novel_shares([self.document(i) for i in np.flatnonzero(self.splits == HELDOUT)], real),
            "novel_of_pairs": novel_shares(partners, real, seeds),
            "subject": subject_kept(partners, seeds, real, len(self.tokenizer)),
        })  # fmt: skip

    def _text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids[1:-1].tolist()))[:600]

    def _score(self, name: str, model: Path, record: dict[str, Any]) -> None:
        heldout = [self.document(i) for i in np.flatnonzero(self.splits == HELDOUT)]
        context = self.experiment.model.context_length
        self.losses[name] = document_losses(model, heldout, context, resolve_device(self.given.device))
        self.given.write({**record, **perplexities(name, self.losses)})

    def _common(self, name: str) -> dict[str, Any]:
        section = self.experiment.pretraining
        return {
            "model": self.experiment.model, "tokenizer_dir": self.given.data / "tokenizer", "seed": section.seeds[0],
            "heldout_tokens": section.heldout_tokens, "evaluations": section.evaluations, "device": self.given.device,
            "compile": self.given.compile, "threads": 8 if self.on_gpu else 1, "checkpoint_minutes": 1e6,
            "microbatch_tokens": section.tokens_per_step, "work_dir": self.given.work / f"{name}-work",
            "output_dir": self.given.work / name,
        }  # fmt: skip


def run(study: Study, weight_decays: list[float]) -> None:
    """Run all parts in their order; what fails is a line of the results, and what does not need it goes on."""
    chosen = study.experiment.synthesizer.start
    baselines = {}
    for number, decay in enumerate(weight_decays):
        baselines[decay] = study.arm(f"baseline_{decay:g}", "baseline", decay)
        last = study.losses[f"baseline_{decay:g}"]
        if number == 0 or last[0].sum() < study.losses["baseline"][0].sum():
            study.weight_decay = decay
            study.losses["baseline"] = last
            study.losses["early_stopped"] = study.losses.get(f"baseline_{decay:g}_early_stopped", last)
    baseline = baselines[study.weight_decay]
    study.given.write({"weight_decay": study.weight_decay, "synthesizer_starts_from": chosen})
    starts = {"final": baseline, "early_stopped": best_model(baseline)}
    other = "final" if chosen == "early_stopped" else "early_stopped"

    def sbp(name: str, start: Path, partners_seed: int | None = None) -> None:
        synthesizer = study.tune(f"{name}_synthesizer", start, partners_seed)
        study.arm(name, "sbp", synthetic=study.synthesise(f"{name}_syntheses", synthesizer))

    def unconditional() -> None:
        synthetic = study.synthesise("unconditional_syntheses", starts[chosen], conditional=False)
        study.arm("unconditional", "sbp", synthetic=synthetic)

    parts: dict[str, Callable[[], object]] = {
        "oracle": lambda: study.arm("oracle", "oracle"),
        "sbp": lambda: sbp("sbp", starts[chosen]),
        "unconditional": unconditional,
        "random_pairs": lambda: sbp("random_pairs", starts[chosen], study.experiment.first_seed),
    }
    if starts[chosen] != starts[other]:
        parts[f"sbp_{other}"] = lambda: sbp(f"sbp_{other}", starts[other])
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # the other parts are worth their time all the same
            traceback.print_exc()
            study.given.write({"failed": name, "error": f"{type(error).__name__}: {error}"[:1000]})


def main(given: Any) -> None:
    started = time.monotonic()
    results = Path(given.results)
    results.parent.mkdir(parents=True, exist_ok=True)

    def write(record: dict[str, Any]) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - started, 1), **record})
        with results.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line[:1500], flush=True)

    with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as name:

        def end() -> None:
            write({"ended": "the time was over"})
            shutil.rmtree(name, ignore_errors=True)

        with ending_after(given.minutes, end):
            data, experiment = load(Path(given.data), Path(name))
            if given.size == "tiny":
                data, experiment = smaller(data, experiment, Path(name) / "smaller", TINY)
            if given.tuning_epochs is not None:
                tuning = experiment.synthesizer.model_copy(update={"epochs": given.tuning_epochs})
                experiment = experiment.model_copy(update={"synthesizer": tuning})
            sections = ("pairing", "model", "pretraining", "synthesizer", "synthesis")
            write({**describe(), "settings": experiment.model_dump(mode="json", include=set(sections))})
            study = Study(Given(data, experiment, Path(name), given.device, given.compile, given.sequences, write))
            write({"parameters": experiment.model.parameters(len(study.tokenizer))})
            study.real_documents()
            run(study, given.weight_decays)
            write({"ended": "all parts"})


def _optimizer(section: Optimizer, **changes: Any) -> Optimizer:
    return Optimizer.model_validate({field: getattr(section, field) for field in Optimizer.model_fields} | changes)


def _evenly(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int)).tolist() if total else []


def _run_record(model: Path) -> dict[str, Any]:
    record = json.loads((model / "run.json").read_text(encoding="utf-8"))
    curve = pl.read_parquet(model / "metrics.parquet", glob=False).drop_nulls("heldout_loss")
    names = ("tokens", "tokens_per_second", "mfu", "final_train_loss", "best_step")
    return {
        "seconds_to_train": record["seconds"],
        **{name: record[name] for name in names},
        "heldout_curve": [[step, round(loss, 4)] for step, loss in curve.select("step", "heldout_loss").rows()],
    }


if __name__ == "__main__":
    taking = parser(__doc__)
    commands = taking.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write what is needed of the profile's store into a folder")
    exporting.add_argument("data", help="the folder")
    running = commands.add_parser("run", help="train, sample and measure")
    running.add_argument("data", help="the folder that export has written, or a .tar.xz of it")
    running.add_argument("results", help="file of the results, one JSON object a line")
    running.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    running.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: seconds on a CPU")
    running.add_argument("--minutes", type=float, default=8, help="after which it ends (default: 8)")
    running.add_argument("--weight-decays", type=float, nargs="+", default=[0.1, 1.5], help="default: 0.1 1.5")
    running.add_argument("--tuning-epochs", type=float, help="of the synthesizer (default: the settings')")
    running.add_argument("--sequences", type=int, default=4096, help="sampled at a time, at most (default: 4096)")
    running.add_argument("--compile", action="store_true", help="compile the layers")
    chosen = taking.parse_args()
    if chosen.command == "export":
        print(json.dumps(export(Path(chosen.data))))
    elif chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.text_gpu: torch finds no CUDA device; --device cpu --size tiny runs every part")
    else:
        main(chosen)
