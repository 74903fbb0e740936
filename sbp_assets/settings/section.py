"""What every section of the settings has in common: it is immutable, strict, and holds no credentials."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _a_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


# Every number of the settings is one of these, so that each is finite and has two bounds; a test looks at all of them.
Integer = Annotated[int, BeforeValidator(_a_number)]
Real = Annotated[float, BeforeValidator(_a_number), Field(allow_inf_nan=False)]
# Up to 2**53 an integer survives JSON and floating-point arithmetic exactly.
Count = Annotated[Integer, Field(ge=1, le=2**53)]
Seed = Annotated[Integer, Field(ge=0, le=2**53)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
# Processes, requests or rows at a time: each takes memory.
AtATime = Annotated[Integer, Field(ge=1, le=1_000_000)]
Seconds = Annotated[Real, Field(gt=0, le=1e6)]
Name = Annotated[str, Field(min_length=1)]


class SettingsError(ValueError):
    """A profile or an environment override that cannot be used; the message names the key and the reason."""


# A user with a password (a colon before digits alone is a port); over HTTP also a bare user, or a query, which is where
# tokens and signatures stand.
_CREDENTIALS = re.compile(r"://[^/\s]*:(?!\d+(?:/|$))\S*@|\bhttps?://(?:[^/\s]*@|\S*\?)", re.IGNORECASE)


class Section(BaseModel):
    """A settings section: immutable; unknown keys are refused, and so are credentials in a URL.

    Settings are digested, printed and kept beside what they made, so no key may be in them. Errors never repeat a
    value: what is wrong may be just that it is a secret.
    """

    # protected_namespaces=(): `model` is the field's own word for the thing pretrained here.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any("\0" in text for text in texts):
            raise ValueError("holds a null character, which no path, variable or query can")
        if any("\ud800" <= character <= "\udfff" for text in texts if not text.isascii() for character in text):
            raise ValueError("is not UTF-8")
        # fsspec chains URLs with '::'.
        if any(_CREDENTIALS.search(url) for text in texts for url in text.split("::")):
            raise ValueError(
                "holds a URL with a user, password or query: settings are printed and kept, so credentials are given "
                "to the file system in the environment alone; see docs/security.md"
            )
        return value
