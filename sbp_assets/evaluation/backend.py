"""lm-eval's Hugging Face backend with progress; apart from the suite because it loads torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


class CountingHFLM(HFLM):
    """lm-eval's Hugging Face backend, which computes what lm-eval computes and counts as it goes.

    Each forward pass calls `on_sequences` with its number of sequences. `truncated` is the number of different prompts
    that were cut to the context: one of a multiple-choice question, however many of its choices do not fit.
    """

    def __init__(self, on_sequences: Callable[[int], None], **arguments: Any) -> None:
        self._on_sequences = on_sequences
        self.truncated = 0
        super().__init__(**arguments)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        # The model reads all but the target's last token.
        long = (context for _, context, target in requests if len(context) + len(target) > self.max_length + 1)
        self.truncated += len({tuple(context) for context in long})
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Prompts to generate from come here, each once, and are cut as a batch: the mask tells their own lengths.
        if left_truncate_len:
            _, mask = super().tok_batch_encode(strings, padding_side, **keywords)
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, **keywords)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        out = super()._model_call(inps, *arguments, **keywords)
        self._on_sequences(inps.shape[0])
        return out

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        out = super()._model_generate(context, *arguments, **keywords)
        self._on_sequences(context.shape[0])
        return out
