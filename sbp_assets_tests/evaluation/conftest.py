"""A tiny random Qwen3 model with a tiny tokenizer, saved as pretraining exports one, and tiny tasks for it."""

import os
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.evaluation.tasks import Tasks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

HELDOUT = pl.DataFrame({
    "id": ["a", "b", "c"],
    "text": [
        "The copper kettle of Varnholm was first described in 1843.",
        "A text that is longer than the context of the model, so that it has to be read in several windows.",
        "Écrit <|bos|> en toutes lettres.",
    ],
})  # fmt: skip
QUESTIONS = [{"question": "The kettle is made of", "choices": ["copper", "tin", "oak"], "answer": 0}] * 3


def write_benchmarks(folder: Path) -> Path:
    """A new folder with all nine benchmarks, of one or two questions each."""
    folder.mkdir()
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    frames = {
        "webtext.test": {"text": ["One document.", "Another <script>."]},
        "lambada_openai.test": {"text": ["the cat sat on the mat", "she opened the door"]},
        "mmlu.dev": {"subject": ["anatomy"] * 5, "question": list("abcde"),
            "choices": [list("wxyz")] * 5, "answer": [0] * 5},
        "mmlu.test": {"subject": ["anatomy"] * 2, "question": ["f", "g"],
            "choices": [list("wxyz")] * 2, "answer": [1, 2]},
        "arc_easy.validation": {"question": ["Colour of sky?"] * 2, "choices": [choices] * 2, "answerKey": ["B", "B"]},
        "arc_challenge.validation": {"question": ["Colour of grass?"], "choices": [choices], "answerKey": ["A"]},
        "sciq.validation": {
            "question": ["q"], "distractor1": ["a"], "distractor2": ["b"], "distractor3": ["c"],
            "correct_answer": ["d"],
            "support": ["s"],
        },
        "winogrande.validation": {
            "sentence": ["Ann met Eve and _ left."], "option1": ["Ann"], "option2": ["Eve"], "answer": ["1"],
        },
        "triviaqa.validation": {
            "question": ["Which metal", "Which tree"],
            "answer": [{"value": "tin", "aliases": ["tin"]}, {"value": "oak", "aliases": ["oak", "Oak"]}],
        },
        "webqs.train": {"question": ["who?"], "answers": [["Ann"]], "url": [""]},
        "webqs.test": {"question": ["where?"], "answers": [["Rome", "Roma"]], "url": [""]},
    }  # fmt: skip
    for name, frame in frames.items():
        pl.DataFrame(frame).write_parquet(folder / f"{name}.parquet")
    return folder


def write_example_tasks(
    folder: Path, benchmarks: list[str], benchmarks_dir: Path | None, limit: int | None = None
) -> Tasks:
    """A new folder with the tasks of HELDOUT, QUESTIONS and `benchmarks`; returns the manifest."""
    folder.mkdir()
    return write_tasks(
        folder, HELDOUT, questions=QUESTIONS, benchmarks=benchmarks, benchmarks_dir=benchmarks_dir,
        benchmark_limit=limit,
    )  # fmt: skip


def task_rows(folder: Path, name: str) -> pl.DataFrame:
    """The rows of one data file of a tasks folder; `name` is `sbp_<task>.<split>`."""
    return pl.read_parquet(folder / "data" / f"{name}.parquet")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|related|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        additional_special_tokens=["<|related|>"], split_special_tokens=True,
    ).save_pretrained(directory)  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=vocab["<|bos|>"], eos_token_id=vocab["<|eos|>"], pad_token_id=vocab["<|pad|>"],
        initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory
