"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows `description`, the docstring of a benchmark, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser_with_profile(description: str | None, default: str | None) -> argparse.ArgumentParser:
    """Return such a parser that takes a settings profile as its first argument."""
    taking = parser(description)
    meant = "$SBP_PROFILE" if default is None else default
    taking.add_argument("profile", nargs="?", default=default, help=f"settings profile (default: {meant})")
    return taking
