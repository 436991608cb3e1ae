# The daemon alone; records go to the jsonl sink until a handler is given. docs/DEPLOYMENT.md has the
# whole of it; deploy/docker/handler/ adds a handler in three lines, deploy/docker/compose.yaml runs
# it beside a database and what watches it.
#
# It listens on every address of the container, and leaves with 78 until credentials of clients are set.
#
# ARG BASE may be pinned by its digest: --build-arg BASE=python:3.13-slim-trixie@sha256:…
ARG BASE=python:3.13-slim-trixie

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The lock files first: they change less often than the code, and their layers are kept. pip compiles
# what it installs, so nothing has to be compiled, or could be, where the root is read-only.
COPY requirements/run.txt requirements/build.txt requirements/
RUN python -m venv /opt/ingestd \
 && /opt/ingestd/bin/pip install --require-hashes --only-binary :all: -r requirements/run.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY ingestd/ ingestd/
RUN /opt/build/bin/hatchling build --target wheel \
 && /opt/ingestd/bin/pip install --no-deps --no-index dist/*.whl

FROM ${BASE}
# tini is process 1: it passes signals on and reaps what handlers orphan. `ingestd run` can do that
# itself (ingestd/host/pid1.py), with a second Python process and for itself alone; this is a few
# kilobytes, and there for `ingestd prove`, a shell and whatever else the image is asked to run.
#
# A number for the user, because Kubernetes can't tell whether a name is root. The daemon makes what
# is below the data directory; the directory itself has to be its own before a volume is mounted on
# it.
#
# The official image comes without the standard library's bytecode. Without it, and on a read-only
# root, each start and each worker would compile what it imports again.
#
# The newest tini of the base's own release is the right one, so it has no version here.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
 && install -d -m 0700 -o 10001 -g 10001 /var/lib/ingestd \
 && install -d /app /etc/ingestd \
 && python -m compileall -q -x '/(test|tests|idlelib|tkinter|turtledemo|ensurepip|site-packages|dist-packages)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=build /opt/ingestd /opt/ingestd
ENV PATH=/opt/ingestd/bin:$PATH \
    INGESTD_DATA_DIR=/var/lib/ingestd \
    INGESTD_HTTP__LISTEN=0.0.0.0:8080 \
    INGESTD_ADMIN__LISTEN=0.0.0.0:8081
# Handlers are imported from here; settings are read from here or /etc/ingestd.
WORKDIR /app
USER 10001:10001
VOLUME /var/lib/ingestd
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# -s: also where something else is process 1 (docker run --init, a pod's shared process namespace).
ENTRYPOINT ["tini", "-s", "--", "ingestd"]
CMD ["run"]
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["ingestd", "healthcheck"]
# Last, because they change with every build.
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="ingestd" \
      org.opencontainers.image.description="A daemon that turns a Python function into a durable, batched ingestion service." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
