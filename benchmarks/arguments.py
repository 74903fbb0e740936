"""What the benchmarks share: the command line, and the settings of the profile that it names."""

from __future__ import annotations

import argparse
import os

from sbp_assets.settings import Settings, load_settings


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows `description`, the docstring of a benchmark, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser_with_profile(description: str | None, default: str | None) -> argparse.ArgumentParser:
    """Return such a parser that takes a settings profile as its first argument."""
    taking = parser(description)
    meant = "$SBP_PROFILE" if default is None else default
    taking.add_argument("profile", nargs="?", default=default, help=f"settings profile (default: {meant})")
    return taking


def profile_settings(profile: str) -> Settings:
    """Return the settings of `profile`; commands that the benchmark starts act on that profile, too."""
    os.environ["SBP_PROFILE"] = profile
    return load_settings()
