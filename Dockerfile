# syntax=docker/dockerfile:1

# The rerank server, for CPUs or for NVIDIA GPUs:
#
#   docker build -t qwen-rerank .
#   docker build -t qwen-rerank:cuda --build-arg VARIANT=cuda .
#
#   docker run -p 8080:8080 -e QWEN_RERANK_API_KEYS=... -v rerank-models:/models qwen-rerank
#   docker run -p 8080:8080 -e QWEN_RERANK_API_KEYS=... -v rerank-models:/models --gpus all qwen-rerank:cuda
#
# The image holds no checkpoint but the package's own small one (`--model pocket`): another is downloaded into /models at
# the first start, or mounted and named (`qwen-rerank --model /models/my-reranker`). Without a key the server does not
# start, unless told `--no-auth`.
ARG PYTHON_VERSION=3.11
ARG VARIANT=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS build-cpu
# PyTorch's own builds without CUDA; elsewhere, torch for Linux brings several GB of CUDA libraries.
ENV UV_TORCH_BACKEND=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS build-cuda

# hadolint ignore=DL3006
FROM build-${VARIANT} AS build
ARG TORCH_VERSION=2.13.0
ENV VIRTUAL_ENV=/opt/venv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy
RUN pip install --no-cache-dir uv==0.13.8 && uv venv "$VIRTUAL_ENV"
# In a layer of its own, which stays when only the package changes.
RUN uv pip install --no-cache "torch==${TORCH_VERSION}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN uv pip install --no-cache ".[serve,local]"

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime-cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime-cuda
# Triton compiles the launcher of each kernel with the system's C compiler when it is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM runtime-${VARIANT}
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin rerank \
    && install --directory --owner=rerank --group=rerank /models
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /models
EXPOSE 8080
STOPSIGNAL SIGTERM
# Green when requests are taken; a first start downloads the checkpoint before that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["qwen-rerank", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["--model", "Qwen/Qwen3-Reranker-0.6B"]
