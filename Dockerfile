# The worker as an image, made from the lock. Two targets:
#   docker build --target cpu  --tag sentiment-worker:cpu .
#   docker build --target cuda --tag sentiment-worker:cuda .
# BASE is any image with a shell, Python 3.11 or newer with its venv module, and CA certificates. A tag is whatever it is today:
# pin it by --build-arg BASE=python:3.11-slim-bookworm@sha256:…, with the digest that your registry gives.
# Docker's classic builder makes every stage above the target, hence the small one first.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS tools
COPY requirements/uv.txt /tmp/
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --require-hashes -r /tmp/uv.txt
ENV PATH=/opt/uv/bin:$PATH UV_PYTHON=/opt/worker/bin/python UV_LINK_MODE=copy UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
RUN python3 -m venv --without-pip /opt/worker
WORKDIR /src

# The package alone, in an environment at the same place: a small layer over the big one of its dependencies.
FROM tools AS worker
COPY requirements/torch.txt requirements/
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY worker worker
RUN uv build --wheel --require-hashes --build-constraints requirements/torch.txt && uv pip install --no-deps dist/*.whl

# torch's CPU build is the one package that no hash is checked of: the locked version, but from torch's own channel, whose
# files have other hashes. With --build-arg TORCH=locked, or where that cannot be reached, the plain package is taken by its
# hash. It does the same, and brings CUDA's libraries, for without them it cannot be imported.
# triton is the compiler behind torch.compile, which the worker does not use.
FROM tools AS packages-cpu
ARG TORCH=cpu
COPY requirements/onnx.txt requirements/torch.txt requirements/
RUN uv pip install --require-hashes -r requirements/onnx.txt
RUN echo triton >unused && version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt) && \
    { { [ "$TORCH" = cpu ] && uv pip install --torch-backend=cpu --constraint requirements/torch.txt "torch==$version"; } || \
      { echo "taking torch's plain package: TORCH=$TORCH, or its CPU channel cannot be reached" && \
        uv pip install --require-hashes --excludes unused -r requirements/torch.txt; }; } && \
    rm -rf /opt/worker/lib/python3*/site-packages/torch/include && /opt/worker/bin/python -c 'import torch'

FROM ${BASE} AS cpu
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sentiment-worker" \
      org.opencontainers.image.description="Scores the sentiment of texts from Kafka to Kafka, on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=packages-cpu /opt/worker /opt/worker
COPY --from=worker /opt/worker /opt/worker
# /cache is the one folder that is written to: the hub's checkpoints, the exported model, temporary files.
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /cache
ENV PATH=/opt/worker/bin:$PATH PYTHONUNBUFFERED=1 HOME=/cache TMPDIR=/cache XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface WORKER_HTTP_HOST=0.0.0.0 WORKER_HTTP_PORT=8080
USER 65532:65532
EXPOSE 8080
# Alive, not ready: whoever restarts what is unhealthy should not do so for a broker's sake.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, urllib.request; \
urllib.request.urlopen('http://127.0.0.1:' + os.environ['WORKER_HTTP_PORT'] + '/livez', timeout=4)"]
ENTRYPOINT ["sentiment-worker"]
CMD ["run"]

FROM tools AS packages-cuda
COPY requirements/runtime.txt requirements/torch.txt requirements/
RUN uv pip install --require-hashes -r requirements/runtime.txt
RUN echo triton >unused && uv pip install --require-hashes --excludes unused -r requirements/torch.txt && \
    rm -rf /opt/worker/lib/python3*/site-packages/torch/include && /opt/worker/bin/python -c 'import torch'

FROM ${BASE} AS cuda
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sentiment-worker" \
      org.opencontainers.image.description="Scores the sentiment of texts from Kafka to Kafka, on an NVIDIA GPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=packages-cuda /opt/worker /opt/worker
COPY --from=worker /opt/worker /opt/worker
RUN mkdir -m 1777 /cache
VOLUME /cache
WORKDIR /cache
# The last two are how NVIDIA's container toolkit knows what to bring in.
ENV PATH=/opt/worker/bin:$PATH PYTHONUNBUFFERED=1 HOME=/cache TMPDIR=/cache XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface WORKER_HTTP_HOST=0.0.0.0 WORKER_HTTP_PORT=8080 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, urllib.request; \
urllib.request.urlopen('http://127.0.0.1:' + os.environ['WORKER_HTTP_PORT'] + '/livez', timeout=4)"]
ENTRYPOINT ["sentiment-worker"]
CMD ["run"]
