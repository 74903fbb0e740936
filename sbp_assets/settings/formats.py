"""Types of settings that are texts of a certain form: paths and URLs, schedules, sizes. Each is checked at load."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
import zoneinfo
from typing import Annotated

from pydantic import AfterValidator, Field

# One protocol, or several that fsspec chains: zip://*.jsonl::https://host/a.zip, simplecache::s3://bucket/key.
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{\w+\}")


def is_url(text: str) -> bool:
    """Return whether `text` is an fsspec URL rather than the path of a file or folder."""
    return _URL.match(text) is not None


def is_one_line(text: str) -> bool:
    """Return whether `text` has no line break and no other control character."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


def local_folder(text: str, profile: str) -> str:
    """Return the absolute path that the setting `text` of a folder names, in one spelling.

    `{profile}` stands for `profile` and a leading `~` for the home directory; everything else is taken as it is
    written. Raises ValueError, whose message repeats nothing of the path, where some part of the project could not
    open what is in the folder, or would open something else.
    """
    written = os.path.expanduser(text.replace("{profile}", profile))
    _of_the_locale(written)  # before the file system is asked
    # Other braces are characters of a name, where something of that name is there already.
    for index, part in enumerate(parts := written.split("/")):
        if _PLACEHOLDER.search(part) and not os.path.exists("/".join(parts[: index + 1])):
            raise ValueError(
                "holds a name in braces that stands for nothing: {profile} alone is filled in. Where the folder is "
                "called so, create it first"
            )
    try:
        path = "/" + os.path.realpath(written).lstrip("/")  # realpath keeps two leading slashes
    except OSError as error:
        raise ValueError(
            f"cannot be made absolute: {error.strerror} ({error.filename or 'working directory'})"
        ) from None
    _of_the_locale(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "is, from / on, a path that is not UTF-8, which Parquet and SQLite files cannot be opened by: rename that "
            "folder, or name another one"
        ) from None
    if not is_one_line(path):
        raise ValueError("is, from / on, a path with a line break or another control character")
    if "{profile}" in path:
        raise ValueError("is, from / on, a path with {profile} in it, which would be filled in when it is read again")
    return path


def _of_the_locale(path: str) -> None:
    if not path.isascii() and sys.getfilesystemencoding().lower() != "utf-8":
        raise ValueError(
            "is, from / on, a path with other characters than ASCII, and file names have no others in the locale of "
            "this process: set PYTHONUTF8=1, or a UTF-8 locale"
        )


def _is_location(text: str) -> str:
    if not is_url(text):
        _of_the_locale(text)
    for part in text.split("::") if is_url(text) else ():
        protocol, separator, _ = part.partition("://")
        if not separator and not re.fullmatch("[a-z]*", part):
            continue  # fsspec takes it for a path of this machine
        from fsspec.registry import known_implementations, registry  # a quarter of a second

        if protocol not in known_implementations and protocol not in registry:
            known = ", ".join(sorted(known_implementations))
            raise ValueError(f"is a URL of a protocol that fsspec does not know; it knows {known}")
    return text


def _is_folder(text: str) -> str:
    if is_url(text):
        raise ValueError("is a URL: this has to be a folder of this machine")
    return text


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("weekday", 0, 7, _WEEKDAYS),
)
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip


def _is_cron(text: str) -> str:
    # What Dagster takes and finds a next time for. Its own parser comes with dagster, which settings do not import.
    parts = [part.lower() for part in _ALIASES.get(text.lower(), text).split()]
    if len(parts) != len(_CRON):
        raise ValueError(
            "is not a cron expression: give minute, hour, day, month and weekday, as in '0 2 * * *', or one of "
            + ", ".join(_ALIASES)
        )
    parts[2], parts[4] = ("*" if part == "?" else part for part in (parts[2], parts[4]))
    # The first Monday of a month (mon#1) or its last one (l1), beside which no day may be given.
    if parts[2] == "*" and re.fullmatch(rf"(?:[0-7]|{'|'.join(_WEEKDAYS)})#[1-5]|l[0-7]", parts[4]):
        parts[4] = "*"
    values = {field[0]: _cron_values(part, *field) for part, field in zip(parts, _CRON, strict=True)}
    if min(values["day"]) > max(_DAYS[month - 1] for month in values["month"]):
        raise ValueError("is a cron expression of a day that never comes: none of its months has so many days")
    return text


def _cron_values(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    """Return the values that a field of a cron expression stands for; raise ValueError where it is none."""
    values: set[int] = set()
    for item in text.split(","):
        if item == "l" and name == "day":
            values.add(min(_DAYS) - 1)  # the last one of every month: at least the 28th
            continue
        spelt = re.sub("|".join(names), lambda name: str(low + names.index(name[0])), item) if names else item
        match = re.fullmatch(r"(?:\*|(\d{1,2})(-\d{1,2})?)(/\d{1,2})?", spelt, re.ASCII)
        one, to, step = match.groups() if match else (None, None, None)
        first = int(one or low)
        last = int(to[1:]) if to else first if one and not step else high
        every = int(step[1:]) if step else 1
        round_the_end = to is not None and first > last and not step  # fri-mon
        if not match or not low <= first <= high or not (first <= last or round_the_end) or not 1 <= every <= high:
            raise ValueError(
                f"is not a cron expression: its {name} is of {low} to {high}, written as 5, 1-5, */10 or 1,3"
            )
        values.update(range(first, high + 1) if round_the_end else range(first, last + 1, every))
        values.update(range(low, last + 1) if round_the_end else ())
    return values


def _is_timezone(text: str) -> str:
    if text not in zoneinfo.available_timezones():
        raise ValueError("is not a time zone: give an IANA name, as in Europe/Berlin")
    return text


def memory_bytes(text: str) -> float:
    """Return the bytes of a size of memory such as '4GB'; raise ValueError where it is none."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])(i?)B", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError("is no size of memory: give a number and its unit (MB, GB, TB, MiB, GiB, TiB), as in 4GB")
    return float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper()))


def _is_memory(text: str) -> str:
    if not 64e6 <= memory_bytes(text) <= 1e15:
        raise ValueError("is out of range: 64MB to 1000TB")
    return text


def _is_ray_address(text: str) -> str:
    if text in ("local", "auto"):
        return text
    match = re.fullmatch(r"[A-Za-z0-9_.-]+:(\d{1,5})|\[[0-9A-Fa-f:.]+\]:(\d{1,5})", text, re.ASCII)
    if not match or not 1 <= int(match[1] or match[2]) <= 65535:
        raise ValueError(
            "is no address of a Ray cluster: give local, auto, or host:port as `ray start --head` prints it (a ray:// "
            "address is one of Ray's client, which is not used)"
        )
    return text


Location = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_is_location)]
"""A path, or a URL of a protocol that fsspec knows; whether its package is installed is found out where it is used."""
Folder = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_is_folder)]
Cron = Annotated[str, AfterValidator(_is_cron)]
TimeZone = Annotated[str, AfterValidator(_is_timezone)]
MemorySize = Annotated[str, AfterValidator(_is_memory)]
RayAddress = Annotated[str, Field(max_length=300), AfterValidator(_is_ray_address)]
WebAddress = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(?:/\S*)?$")]
# As Dagster has them.
_EMAIL = r"[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}"
Owner = Annotated[str, Field(pattern=rf"^(?:team:[\w.-]+|{_EMAIL})$", max_length=200)]
