# The daemon alone; records go to the jsonl sink until a handler is given. To add yours:
#
#   FROM ingestd
#   COPY store.py .
#   CMD ["run", "store:store"]
#
# It listens on every address of the container, and leaves with 78 until it is told who may come in:
#
#   docker run -e INGESTD_HTTP__TOKENS__SHOP__HASH=sha256:… -p 8080:8080 ingestd
#
# with what `docker run ingestd token` says; or INGESTD_HTTP__ALLOW_ANONYMOUS=true, where nobody else
# can reach the container. What a handler imports is installed with /opt/ingestd/bin/pip.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The lock files first: they change less often than the code, and their layers are kept.
COPY requirements/run.txt requirements/build.txt requirements/
RUN python -m venv /opt/ingestd \
 && /opt/ingestd/bin/pip install --require-hashes --only-binary :all: -r requirements/run.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY ingestd/ ingestd/
RUN /opt/build/bin/hatchling build --target wheel \
 && /opt/ingestd/bin/pip install --no-deps --no-index dist/*.whl

FROM python:${PYTHON}-slim
# A number, because Kubernetes can't tell whether a name is root. The daemon makes what is below
# the data directory; the directory itself has to be its own before a volume is mounted on it.
RUN install -d -m 0700 -o 10001 -g 10001 /var/lib/ingestd \
 && install -d /app /etc/ingestd
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
ENTRYPOINT ["ingestd"]
CMD ["run"]
