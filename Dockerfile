# The image of deploy/compose.yaml: one for code, webserver and daemon.
FROM python:3.11-slim-bookworm

# make installs as in a checkout. vLLM loads libnuma1, numba libgomp1.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache make install VENV=/opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Code and packages belong to root and are only read. What the profiles keep is .sbp/<profile>/ in the current directory.
RUN useradd --uid 1000 --create-home sbp && install --directory --owner=sbp /data
USER 1000
WORKDIR /data
ENTRYPOINT ["/app/deploy/entrypoint.sh"]
CMD ["sbp", "plan"]
