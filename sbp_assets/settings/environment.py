"""Environment variables: those that set a setting, and the others that this project reads.

`SBP_EXPERIMENT__CORPUS__SHARDS=8` sets `experiment.corpus.shards`. The type of the setting says how the text is read:

- a list or a section is JSON: `[0, 1]`, `{"kind": "files", "path": "/data"}`. A section given whole replaces the
  profile's, and variables of its single settings apply on top of it;
- `null` is null where the setting may be null;
- everything else is the text as it stands, which pydantic converts for a number, a boolean or a choice. A string
  stays what was typed: `007` is `007`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from sbp_assets.settings.section import Section

ENV_PREFIX = "SBP_"
ENV_SEPARATOR = "__"

OTHER_VARIABLES = {
    "SBP_PROFILE": "Profile to load, by name or by the path of its YAML file; default: demo.",
    "SBP_POSTGRES_URL": "Secret. Database of the run and event storage; default: SQLite in deployment.instance_dir.",
    "SBP_JUDGE_API_KEY": "Secret. Key that is sent to deployment.judge_url.",
    "SBP_WEBHOOK_URL": "Secret. Where the sensor of failed runs posts its messages.",
    "SBP_INSTANCE_DIR": "deployment.instance_dir for dagster.yaml, which cannot read settings; `sbp env` exports it.",
    "SBP_ENV_PROFILE": "Profile whose environment the shell has; `sbp env` exports it, and other profiles are refused.",
    "SBP_WORKSPACE": "Path of workspace.yaml for the -w of Dagster's commands; `sbp env` exports it.",
    "SBP_LAUNCHER_PID": "Process that a training worker belongs to; the worker ends with it. Set by the launcher.",
    "SBP_SCREENSHOTS": "Folder in which the browser tests leave their screenshots; default: build/screenshots.",
    "SBP_FINISHED_STORE": "Finished store of an earlier session that the operations tests start from.",
}
"""Every variable of this project that sets no setting, and what it is for."""


def variable(*path: str) -> str:
    """Return the environment variable that sets the setting at `path`, e.g. ("experiment", "corpus", "shards")."""
    return ENV_PREFIX + ENV_SEPARATOR.join(path).upper()


def as_utf8(text: str) -> str:
    """Return `text`, an argument or a variable of this process, read as UTF-8 whatever the locale.

    What is not UTF-8 is returned as it is, with surrogates for the bytes.
    """
    if text.isascii():
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def as_text(value: Any) -> str:
    """Return the text of an environment variable that is read back as `value`, for a setting of that value's type."""
    return value if isinstance(value, str) else json.dumps(value)


def setting_types(section: type[BaseModel], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[Any]]:
    """Return every setting of `section` and of the sections in it: {path: the types that its value may have}.

    Where a section is one of several kinds (`corpus.source`), the settings of all kinds are included.
    """
    types: dict[tuple[str, ...], list[Any]] = {}
    for key, field in section.model_fields.items():
        alternatives = list(_alternatives(field.annotation))
        types.setdefault((*path, key), []).extend(alternatives)
        for nested in filter(_is_section, alternatives):
            for name, found in setting_types(nested, (*path, key)).items():
                types.setdefault(name, []).extend(found)
    return types


def apply_environment(values: dict[str, Any], environ: Mapping[str, str], settings: type[BaseModel]) -> list[str]:
    """Put the settings of `environ` into `values`, a profile's content; returns what is wrong, one line a variable.

    `settings` is the model that `values` will be validated as. The lines name keys and variables, never a value,
    which may be a secret: unknown variables with the nearest known name, and values that are not JSON.
    """
    types = {path: found for path, found in setting_types(settings).items() if len(path) > 1}
    known = [*(variable(*path) for path in types), *OTHER_VARIABLES]
    # In small letters it would set nothing, and nobody would say so.
    names = [name for name in environ if name.upper().startswith(ENV_PREFIX) and name not in OTHER_VARIABLES]
    wrong = []
    # A section given whole comes before its single settings, whatever the order in the environment.
    for name in sorted(names, key=lambda name: (name.count(ENV_SEPARATOR), name)):
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split(ENV_SEPARATOR))
        where = f"{'.'.join(path)} (from {name})"
        if path not in types or name != name.upper():
            meant = _nearest(name.upper(), known)
            wrong.append(f"{where if len(path) > 1 else name}: is unknown; the nearest name is {meant}")
            continue
        section: Any = values
        for key in path[:-1]:
            if section.get(key) is None:  # also a section that the profile sets to null
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                wrong.append(f"{where}: {key} is set to a value, not to a section")
                break
        else:
            try:
                section[path[-1]] = _read(as_utf8(environ[name]), types[path])
            except ValueError as error:  # its message has a line and a column, and nothing of the text
                wrong.append(f"{where}: not JSON, which a list or a section has to be: {error}")
            except RecursionError:
                wrong.append(f"{where}: nested too deeply")
    return wrong


def _nearest(name: str, known: list[str]) -> str:
    """Return the one of the `known` variables that `name` was probably meant to be."""
    # One whose last part is the same comes first: mostly it is the section that was forgotten or mistaken.
    last = name.removeprefix(ENV_PREFIX).split(ENV_SEPARATOR)[-1]
    same = [other for other in known if other.endswith((ENV_PREFIX + last, ENV_SEPARATOR + last))]
    return nearest(name, same or known)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the one of the `known` names, of which there is one at least, that is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0)[0]


def _read(text: str, types: list[Any]) -> Any:
    """Return a variable's value for a setting of one of `types`; raise ValueError where it must be JSON and is not."""
    if text == "null" and NoneType in types:
        return None
    if any(_is_section(kind) or get_origin(kind) in (tuple, list, dict) for kind in types):
        return json.loads(text, object_pairs_hook=_without_repeats)
    return text


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice} is there twice")
    return keys


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, without the metadata that Annotated adds."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for alternative in get_args(annotation):
            yield from _alternatives(alternative)
    else:
        yield annotation
