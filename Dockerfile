# syntax=docker/dockerfile:1
# docker build -t lungseg:0.1.0 .
# docker build -t lungseg:0.1.0-gpu --build-arg ACCELERATOR=gpu .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG ACCELERATOR=cpu
ARG UV_VERSION=0.13.9
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /app

# Dependencies first: this layer of gigabytes changes only with pyproject.toml.
COPY pyproject.toml ./
RUN case "${ACCELERATOR}" in \
      cpu) extra="" ;; \
      gpu) extra="--extra=gpu" ;; \
      *) echo "ACCELERATOR must be cpu or gpu, not '${ACCELERATOR}'" >&2; exit 2 ;; \
    esac && \
    uv sync --no-dev --no-install-project ${extra} && \
    rm -rf /root/.cache/uv

COPY README.md LICENSE ./
COPY lungseg ./lungseg
# Without a second resolution: the environment is that of the layer above plus lungseg itself.
RUN uv build --wheel --out-dir /tmp/wheel && \
    uv pip install --no-cache --no-deps --python .venv/bin/python /tmp/wheel/*.whl


FROM ${PYTHON_IMAGE}
# wget: older KubeRay operators probe by it inside the pod; newer ones ask over HTTP.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --create-home --home-dir /home/lungseg lungseg
WORKDIR /app
COPY --from=build /app/.venv ./.venv
COPY jobs ./jobs
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
CMD ["lungseg", "--help"]
