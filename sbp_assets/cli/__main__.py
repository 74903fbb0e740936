"""`python -m sbp_assets.cli` is `sbp`."""

from sbp_assets.cli import app

app()
