# All images of the platform; docs/deployment.md tells how to build and run them.
#
#   base ── builder ─┬─ queue-wheel ──► queue-packages ─────────────► queue            queue server, worker; no GPU library
#                    └─ vision-wheel ─► vision-packages ─┬──────────► production       vision server
#                                                        ├─ h100-packages ─► h100-optimized
#                                                        └─ development-packages ─► development
#
# pip keeps no cache here: neither in a layer (--no-cache-dir, so there is nothing to purge either) nor in a cache mount, which
# would stay on the builder, unchecked, and differ from runner to runner. A second build is quick because the layers are kept:
# a lock file that has not changed installs nothing again.
#
# Bookworm: the deployment guide says bullseye, which has had no security fixes since August 2026.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm


# ---- base: Python, an init, a user, the folders that may be written
FROM ${PYTHON_IMAGE} AS base
# tini passes SIGTERM on and reaps what is left; Debian fixes a stable release's packages without changing their version.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini=0.19.0-* \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    # A number of our own, so that volumes and Kubernetes' runAsUser agree. Its home is /tmp: what nobody thought of goes with the container.
    && groupadd --gid 10001 ai4thai \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ai4thai \
    && install -d -o 10001 -g 10001 /app /data
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    AI4THAI_DATA_DIR=/data
WORKDIR /app
# The root may be read-only: all that is written lies in /data (to be kept) or /tmp (a tmpfs).
VOLUME ["/data"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]


# ---- builder: pip and what our own wheel is built with; nothing of this stage but /opt/venv goes on
FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.txt requirements/
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt


# A wheel has the packages that are here: the queue's no vision_server, the vision server's no queue_server.
FROM builder AS queue-wheel
COPY pyproject.toml README.md ./
COPY clients clients
COPY serving serving
COPY queue_server queue_server
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


FROM builder AS vision-wheel
COPY pyproject.toml README.md ./
COPY clients clients
COPY serving serving
COPY vision_server vision_server
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


FROM builder AS queue-packages
COPY requirements/queue.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/queue.txt
COPY --from=queue-wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl && pip check


FROM builder AS vision-packages
# gpu: torch with CUDA; cpu: torch without, a tenth of the size and from an index of its own.
ARG ACCELERATOR=gpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/torch-cpu.txt requirements/
# Without a hash: the CPU's build is another file of the same version, and which one depends on where it comes from.
RUN if [ "$ACCELERATOR" = cpu ]; then \
      pip install --no-cache-dir --no-deps ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} -r requirements/torch-cpu.txt; \
    fi
COPY requirements/vision-${ACCELERATOR}.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/vision-${ACCELERATOR}.txt
COPY --from=vision-wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl && pip check


# ---- vision: what production and h100-optimized share
FROM base AS vision
# Pillow places Thai tone marks with fribidi.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libfribidi0=1.0.8-* \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
# CUDA_VISIBLE_DEVICES is the run's: an image cannot know which GPU, or which MIG slice, it will be given. torch reads the name
# PYTORCH_CUDA_ALLOC_CONF first and its newer one, PYTORCH_ALLOC_CONF, when that is not set: this one alone means what it says.
ENV VISION_SERVICE_PORT=2001 \
    PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:2048 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    CUDA_CACHE_PATH=/data/cache/cuda
EXPOSE 2001
USER 10001:10001
# Healthy: the models answer. Large ones load for 5 to 10 minutes; failures do not count until then, a success does at once.
HEALTHCHECK --interval=10s --timeout=15s --start-period=15m --retries=3 \
    CMD ["sh", "-c", "exec ai4thai health --grpc localhost:$VISION_SERVICE_PORT --timeout 5"]
CMD ["python", "-m", "vision_server"]


FROM vision AS production
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=vision-packages /opt/venv /opt/venv
LABEL org.opencontainers.image.title="AI4Thai vision server" \
      org.opencontainers.image.description="YOLO and a vision-language model behind gRPC and HTTP on port 2001." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM vision-packages AS h100-packages
COPY requirements/h100.txt requirements/tensorrt.txt requirements/
# nvImageCodec and TensorRT need CUDA: the cpu variant of this target, which is there to be tried without a GPU, goes without.
# TensorRT's libraries lie at NVIDIA, not on PyPI, and have no hash: requirements/tensorrt.txt.
ARG NVIDIA_INDEX=https://pypi.nvidia.com
RUN if [ "$ACCELERATOR" = gpu ]; then \
      pip install --no-cache-dir --no-deps --require-hashes -r requirements/h100.txt \
      && pip install --no-cache-dir --no-deps --extra-index-url "$NVIDIA_INDEX" -r requirements/tensorrt.txt; \
    fi \
    && pip check
# Models that the image brings, by the names of VISION_DETECTOR and VISION_DESCRIBER with spaces between them. The token of gated
# ones is a BuildKit secret (--secret id=hf_token,src=FILE), which no layer and no history has.
ARG PREFETCH_MODELS=""
ARG HF_ENDPOINT=https://huggingface.co
RUN --mount=type=secret,id=hf_token mkdir -p /models \
    && if [ -n "$PREFETCH_MODELS" ]; then \
         python -m vision_server.prefetch --into /models $PREFETCH_MODELS; \
       fi


# ---- h100-optimized: one H100, or a MIG slice of it. Half precision (bf16 for describers, fp16 for detectors) and CUDA graphs are
# what the server does on any GPU; TensorRT is taken for a detector once `ai4thai models export NAME --engine engine` has built it.
# malloc is set by the server itself (serving/process.py, measured), for glibc: another malloc would undo that. MALLOC_ARENA_MAX=4
# was tried: 758 instead of 776 MB after 12-megapixel pictures, which is within the noise.
FROM vision AS h100-optimized
ENV VISION_PREFETCHED_DIR=/models \
    VISION_GPU_DECODE=true \
    VISION_MAX_BATCH=32
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=h100-packages /models /models
COPY --from=h100-packages /opt/venv /opt/venv
LABEL org.opencontainers.image.title="AI4Thai vision server for the H100" \
      org.opencontainers.image.description="YOLO and a vision-language model behind gRPC and HTTP on port 2001; TensorRT, nvImageCodec." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM vision-packages AS development-packages
COPY requirements/dev.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/dev.txt
WORKDIR /app
COPY pyproject.toml README.md ./
COPY clients clients
COPY serving serving
COPY vision_server vision_server
COPY queue_server queue_server
# The source as it lies in /app, where a checkout is mounted over it: docker run -v "$PWD:/app" …
RUN pip uninstall -y ai4thai && pip install --no-cache-dir --no-deps --no-build-isolation --editable . && pip check \
    # So that `make VENV=/opt/venv test` finds it ready.
    && cp pyproject.toml /opt/venv/.ready


# ---- development: tools and tests; everything belongs to the user, so that pip and make may change it
FROM vision AS development
USER 0
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates=20* curl=7.88.* git=1:2.39.* make=4.3-* \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
COPY --from=development-packages --chown=10001:10001 /opt/venv /opt/venv
COPY --from=development-packages --chown=10001:10001 /app /app
USER 10001:10001
HEALTHCHECK NONE
CMD ["python", "-m", "pytest"]


# ---- queue: the queue server; with `python -m queue_server.worker` as its command, the worker
FROM base AS queue
ENV QUEUE_WORKER_PORT=2003
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
COPY --from=queue-packages /opt/venv /opt/venv
EXPOSE 2003
USER 10001:10001
# Of the server. A worker has no port; its check is: ai4thai health --worker
HEALTHCHECK --interval=10s --timeout=15s --start-period=1m --retries=3 \
    CMD ["sh", "-c", "exec ai4thai health --grpc localhost:$QUEUE_WORKER_PORT --timeout 5"]
CMD ["python", "-m", "queue_server"]
LABEL org.opencontainers.image.title="AI4Thai queue server and worker" \
      org.opencontainers.image.description="Jobs that survive, behind gRPC and HTTP on port 2003; the worker by another command." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
