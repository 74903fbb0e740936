"""The command line `sbp`: one thin module per command."""

from sbp_assets.cli.app import app

__all__ = ["app"]
