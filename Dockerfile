# The worker as an image, made from the locks. Two targets:
#   docker build --target cpu  --tag sentiment-worker:cpu .
#   docker build --target cuda --tag sentiment-worker:cuda .
# `cpu` has no torch. --build-arg EXTRAS=torch adds it, for checkpoints that need it; `cuda` always has it.
# EXTRAS=aws adds to either what logins to Amazon MSK need, EXTRAS=aws,torch both.
# BASE is any image with a shell, Python 3.11 or newer with its venv module, and CA certificates. A tag is whatever it is today:
# pin it by --build-arg BASE=python:3.11-slim-bookworm@sha256:…, with the digest that your registry gives.
# Docker's classic builder makes every stage above the target, hence the small one first.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS tools
COPY requirements/uv.txt requirements/sbom.txt /tmp/
RUN python3 -m venv /opt/tools && \
    /opt/tools/bin/pip install --no-cache-dir --require-hashes -r /tmp/uv.txt -r /tmp/sbom.txt
ENV PATH=/opt/tools/bin:$PATH UV_PYTHON=/opt/worker/bin/python UV_LINK_MODE=copy UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
RUN python3 -m venv --without-pip /opt/worker
WORKDIR /src

# The package and, if asked for, the extra `aws`, in an environment at the same place: a small layer over the big one of the
# other dependencies.
FROM tools AS worker
COPY requirements/build.txt requirements/
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY worker worker
RUN uv build --wheel --require-hashes --build-constraints requirements/build.txt && uv pip install --no-deps dist/*.whl
ARG EXTRAS=
COPY requirements/aws.txt requirements/
RUN case "$EXTRAS" in ""|torch) ;; aws|aws,torch|torch,aws) uv pip install --require-hashes -r requirements/aws.txt ;; \
      *) echo "EXTRAS=$EXTRAS: torch, aws or aws,torch can be added" >&2; exit 1 ;; esac

# What both images are, but for what is in /opt/worker.
FROM ${BASE} AS common
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sentiment-worker" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# /cache is the one folder that is written to: the hub's checkpoints and temporary files.
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

# EXTRAS=torch takes torch's CPU build, the one package that no hash is checked of: the locked version, but from torch's own
# channel, whose files have other hashes. With --build-arg TORCH=locked, or where that channel cannot be reached, the plain
# package is taken by its hash. It does the same, and brings CUDA's libraries, for without them it cannot be imported.
# What only serves to compile or test is left out: triton, the compiler behind torch.compile, which the worker does not use,
# headers, static libraries and CUDA's bitcode, and the packages' own tests.
FROM tools AS packages-cpu
COPY requirements/runtime.txt requirements/
RUN uv pip install --require-hashes -r requirements/runtime.txt && \
    find /opt/worker -type d -name tests -prune -exec rm -rf {} +
ARG EXTRAS=
ARG TORCH=cpu
COPY requirements/runtime-torch.txt requirements/torch.txt requirements/
RUN case "$EXTRAS" in torch|aws,torch|torch,aws) ;; *) exit ;; esac; \
    uv pip install --require-hashes -r requirements/runtime-torch.txt && echo triton >unused && \
    version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt) && \
    { { [ "$TORCH" = cpu ] && uv pip install --torch-backend=cpu --constraint requirements/torch.txt "torch==$version"; } || \
      { echo "taking torch's plain package: TORCH=$TORCH, or its CPU channel cannot be reached" && \
        uv pip install --require-hashes --excludes unused -r requirements/torch.txt; }; } && \
    find /opt/worker -type d \( -name tests -o -path '*/torch/include' -o -path '*/nvidia/*/include' \) -prune \
      -exec rm -rf {} + && \
    find /opt/worker \( -name '*.a' -o -name '*.bc' \) -delete && /opt/worker/bin/python -c 'import torch'

# What is installed, as CycloneDX: name, version, licence and what needs what.
FROM packages-cpu AS sbom-cpu
COPY --from=worker /opt/worker /opt/worker
COPY pyproject.toml ./
RUN cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file /sbom.cdx.json /opt/worker

FROM common AS cpu
LABEL org.opencontainers.image.description="Scores the sentiment of texts from Kafka to Kafka, on a CPU"
COPY --from=packages-cpu /opt/worker /opt/worker
COPY --from=worker /opt/worker /opt/worker
COPY --from=sbom-cpu /sbom.cdx.json /opt/worker/

FROM tools AS packages-cuda
COPY requirements/runtime-torch.txt requirements/torch.txt requirements/
RUN uv pip install --require-hashes -r requirements/runtime-torch.txt
RUN echo triton >unused && uv pip install --require-hashes --excludes unused -r requirements/torch.txt && \
    find /opt/worker -type d \( -name tests -o -path '*/torch/include' -o -path '*/nvidia/*/include' \) -prune \
      -exec rm -rf {} + && \
    find /opt/worker \( -name '*.a' -o -name '*.bc' \) -delete && /opt/worker/bin/python -c 'import torch'

FROM packages-cuda AS sbom-cuda
COPY --from=worker /opt/worker /opt/worker
COPY pyproject.toml ./
RUN cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file /sbom.cdx.json /opt/worker

FROM common AS cuda
LABEL org.opencontainers.image.description="Scores the sentiment of texts from Kafka to Kafka, on an NVIDIA GPU"
# How NVIDIA's container toolkit knows what to bring in.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/worker /opt/worker
COPY --from=worker /opt/worker /opt/worker
COPY --from=sbom-cuda /sbom.cdx.json /opt/worker/
