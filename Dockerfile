# ALTER Server. Two targets that differ in base image and ALTER_DEVICE alone:
#   docker build --target gpu -t alter-server:gpu .        (the default)
#   docker build --target cpu -t alter-server:cpu --build-arg TORCH_INDEX_URL=... .
# TORCH_INDEX_URL is PyTorch's CPU package index; see scripts/setup.sh, which installs everything.

# --- cpu ---------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS cpu-base
# g++: torch.compile builds kernels at start-up. libnuma1: vLLM's CPU kernels link to it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM cpu-base AS cpu
ENV ALTER_DEVICE=cpu
ARG TORCH_INDEX_URL
ENV ALTER_VENV=/opt/venv \
    ALTER_EXTRAS="" \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/state \
    ALTER_AUDIT_LOG=/state/audit.sqlite \
    HF_HOME=/state/huggingface
RUN groupadd --gid 10001 alter \
    && useradd --uid 10001 --gid alter --home-dir /state --no-create-home alter \
    && mkdir -p /bundles /state/huggingface \
    && chown -R alter:alter /state
WORKDIR /opt/alter
COPY pyproject.toml LICENSE ./
COPY scripts scripts
RUN --mount=type=cache,target=/root/.cache/pip scripts/setup.sh
COPY alter_core alter_core
COPY trainer trainer
COPY server server
COPY alter_eval alter_eval
COPY alter_cli alter_cli
USER 10001:10001
VOLUME ["/bundles", "/state"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health/ready').raise_for_status()"]
ENTRYPOINT ["alter", "serve"]
CMD ["--help"]

# --- gpu ---------------------------------------------------------------------------------------
# The CUDA release that torch is built for; `devel`, since some kernels are compiled on first use.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS gpu-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM gpu-base AS gpu
ENV ALTER_DEVICE=gpu
ARG TORCH_INDEX_URL
ENV ALTER_VENV=/opt/venv \
    ALTER_EXTRAS="" \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/state \
    ALTER_AUDIT_LOG=/state/audit.sqlite \
    HF_HOME=/state/huggingface
RUN groupadd --gid 10001 alter \
    && useradd --uid 10001 --gid alter --home-dir /state --no-create-home alter \
    && mkdir -p /bundles /state/huggingface \
    && chown -R alter:alter /state
WORKDIR /opt/alter
COPY pyproject.toml LICENSE ./
COPY scripts scripts
RUN --mount=type=cache,target=/root/.cache/pip scripts/setup.sh
COPY alter_core alter_core
COPY trainer trainer
COPY server server
COPY alter_eval alter_eval
COPY alter_cli alter_cli
USER 10001:10001
VOLUME ["/bundles", "/state"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health/ready').raise_for_status()"]
ENTRYPOINT ["alter", "serve"]
CMD ["--help"]
