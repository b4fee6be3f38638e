# docker build -t lungseg:0.1.0 .
# docker build -t lungseg:0.1.0-gpu --build-arg ACCELERATOR=gpu .
# The same base everywhere: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG ACCELERATOR=cpu
ARG UV_VERSION=0.13.9
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /app

# Dependencies first: this layer of gigabytes changes only with the lock. Wheels only, since what builds
# another kind of package would be neither pinned nor hashed.
COPY deploy/requirements.lock deploy/requirements-gpu.lock ./
RUN case "${ACCELERATOR}" in \
      cpu) lock=requirements.lock ;; \
      gpu) lock=requirements-gpu.lock ;; \
      *) echo "ACCELERATOR must be cpu or gpu, not '${ACCELERATOR}'" >&2; exit 2 ;; \
    esac && \
    uv venv && \
    uv pip sync --no-cache --require-hashes --no-build "${lock}"

COPY pyproject.toml README.md LICENSE ./
COPY lungseg ./lungseg
# Without a second resolution: the environment is that of the layer above plus lungseg itself.
RUN uv build --wheel --out-dir /tmp/wheel && \
    uv pip install --no-cache --no-deps --python .venv/bin/python /tmp/wheel/*.whl


FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="lungseg" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Distributed training and evaluation of 3D lung-nodule segmentation on Kubernetes and on a laptop"
# wget: older KubeRay operators probe by it inside the pod; newer ones ask over HTTP.
# Group 0 may do what the user may: OpenShift runs the image as a uid of its own, always in that group.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --gid 0 --create-home --home-dir /home/lungseg lungseg && \
    mkdir /app && \
    chgrp -R 0 /home/lungseg /app && \
    chmod -R g=u /home/lungseg /app
WORKDIR /app
COPY --from=build /app/.venv ./.venv
COPY jobs ./jobs
# USER: a uid without an entry in /etc/passwd has no other name.
ENV HOME=/home/lungseg \
    USER=lungseg \
    PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:0
CMD ["lungseg", "--help"]
