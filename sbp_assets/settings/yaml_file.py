"""Profiles are read as YAML 1.2 has it, which takes fewer texts for something else than PyYAML does by itself.

`010` is ten and not eight, `1:30` no number of seconds, `2026-11-27` no date, `no` not false; and a key that is there
twice, of which PyYAML keeps the last one, is refused. Integers are decimal alone: `0x10` and `0o17` are texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from sbp_assets.settings.section import SettingsError


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:  # before `<<` is replaced by what it merges, which a key beside it may override
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    twice = f"the key {key.value} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # a text that is not of its tag; int() reads 4300 digits at most
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"there is no {kind} that can be read", node.start_mark
            ) from None

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


# The core schema of YAML 1.2.2, section 10.3.2, without hexadecimal and octal integers, and the merge key of 1.1.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping that the YAML file at `path` holds, which is UTF-8 whatever the locale.

    Raises SettingsError with the file, the place and the reason, and nothing of the text but keys.
    """
    try:
        values = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 (byte {error.start + 1}): save it in that encoding") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {_fault(error)}") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: expected a mapping with `experiment` and `deployment`, got {type(values).__name__}"
        )
    return values


def _fault(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text that is: PyYAML's own message quotes it."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1} is one that YAML does not allow"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
