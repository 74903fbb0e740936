#!/bin/sh
# The command, with what Dagster needs to know of the profile: its instance, and in PostgreSQL the schema of its runs.
set -eu
variables=$(sbp env)
eval "$variables"
exec "$@"
