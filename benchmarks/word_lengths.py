"""How much text a word is in different languages, by translations of the same messages.

python -m benchmarks.word_lengths FOLDER

FOLDER holds gettext catalogues of English messages, …/locale/LANGUAGE/LC_MESSAGES/*.mo, for example the unpacked wheel
of Django. Prints for each language, for one English word, the words of `corpus.shingles` and their length, which is to
be near 1; the last line is a JSON object. Messages of fewer than four words, and what is filled in, are left out.
"""

from __future__ import annotations

import json
import re
from gettext import GNUTranslations
from pathlib import Path

from benchmarks.arguments import parser
from sbp_assets.corpus.shingles import UNITS_PER_WORD, Words, normalise, segment

FILLED_IN = re.compile(r"%\([^)]*\)[sdi]|%[sd]|\{[^}]*\}|<[^>]*>")


def messages(catalogue: Path) -> list[tuple[str, str]]:
    """Return English messages and their translations."""
    with catalogue.open("rb") as file:
        # As gettext keeps them: plural forms have a tuple as their key, contexts stand before a message.
        found: dict[object, str] = GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    pairs = [(key.rpartition("\x04")[2], text) for key, text in found.items() if isinstance(key, str) and key]
    return [(FILLED_IN.sub(" ", key), FILLED_IN.sub(" ", text)) for key, text in pairs if key != text]


def main(folder: Path) -> None:
    languages: dict[str, list[tuple[str, str]]] = {}
    for catalogue in sorted(folder.rglob("LC_MESSAGES/*.mo")):
        languages.setdefault(catalogue.parent.parent.name, []).extend(messages(catalogue))
    result = {}
    for language, pairs in languages.items():
        if not pairs:
            continue
        english, translated = (Words.of(segment(map(normalise, texts))) for texts in zip(*pairs, strict=True))
        chosen = english.lengths >= 4
        if not (words := int(english.lengths[chosen].sum())):
            continue
        row = {
            "messages": int(chosen.sum()),
            "words": round(int(translated.lengths[chosen].sum()) / words, 2),
            "length": round(int(translated.totals[chosen].sum()) / UNITS_PER_WORD / words, 2),
        }
        print(f"{language:8}", row)
        result[language] = row
    print(json.dumps(result))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path)
    main(arguments.parse_args().folder)
