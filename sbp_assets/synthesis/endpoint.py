"""Where a judge answers: any OpenAI-compatible endpoint, or what a test puts in its place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, Field, ValidationError

from sbp_assets.settings import Deployment, Judge
from sbp_assets.synthesis.questions import JudgeError, Message

API_KEY = "SBP_JUDGE_API_KEY"


@dataclass(frozen=True)
class Answer:
    """What came back for some messages, and its cost, failed tries included.

    `failure` says why nothing did: timeout, connection, http_<status> or client_error. Both are None where the answer
    was no chat completion.
    """

    content: str | None = None
    failure: str | None = None
    requests: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0


Ask = Callable[[Sequence[Message], Judge], Answer]


class Endpoint(Protocol):
    """What the judgements need of an endpoint."""

    @property
    def concurrency(self) -> int:
        """How many threads may ask at the same time."""

    def session(self) -> AbstractContextManager[Ask]:
        """Return the context in which messages are put to the model that the settings name.

        The function that it yields does not raise when the endpoint fails; leaving the context ends what is under way.
        """


@dataclass(frozen=True)
class OpenAIEndpoint:
    """Asks over HTTP. How patient it is belongs to the deployment, and is no part of a verdict.

    The key, if the endpoint needs one, is read from $SBP_JUDGE_API_KEY and goes nowhere else.
    """

    url: str
    concurrency: int
    timeout: float  # seconds
    retries: int

    @classmethod
    def of(cls, deployment: Deployment) -> OpenAIEndpoint | None:
        """Return the endpoint that the deployment names; None where it names none, and nothing is judged."""
        if deployment.judge_url is None:
            return None
        return cls(
            deployment.judge_url, deployment.judge_concurrency, deployment.judge_timeout, deployment.judge_retries
        )

    @contextmanager
    def session(self) -> Iterator[Ask]:
        """Yield a function that backs off, honours Retry-After and counts what it sends.

        Raises JudgeError for a key that no header can carry.
        """
        import openai

        sent = threading.local()  # requests of each thread: the client sends some again
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise JudgeError(f"${API_KEY} holds characters that an HTTP header cannot carry")

        def count(_: object) -> None:
            sent.requests += 1

        def ask(messages: Sequence[Message], settings: Judge) -> Answer:
            sent.requests, body, failure = 0, b"", None
            try:
                raw = client.chat.completions.with_raw_response.create(
                    model=settings.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    max_tokens=settings.max_tokens,
                    temperature=openai.omit if settings.temperature is None else settings.temperature,
                )
                body = raw.http_response.content
            except openai.APITimeoutError:
                failure = "timeout"
            except openai.APIConnectionError:
                failure = "connection"
            except openai.APIStatusError as error:
                failure = f"http_{error.status_code}"
            except openai.OpenAIError:
                failure = "client_error"
            if failure:
                return Answer(failure=failure, requests=sent.requests)
            try:
                completion = _Completion.model_validate_json(body)
            except ValidationError:
                return Answer(requests=sent.requests)
            usage, content = completion.usage or _Usage(), completion.choices[0].message.content
            # An endpoint that repeats what it was sent must not bring the key into the ledger.
            if content and key:
                content = content.replace(key, f"${API_KEY}")
            return Answer(content, None, sent.requests, usage.prompt_tokens, usage.completion_tokens)

        with openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",  # the client wants one even where the endpoint does not
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [count]}),
        ) as client:
            yield ask


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Text


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    """What of a chat completion is read; servers differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
