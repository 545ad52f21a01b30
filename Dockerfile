# All images of the platform; docs/deployment.md tells how to build and run them.
#
#   base ── builder ─┬─ queue-packages ────────────────────────────► queue            queue server, worker; no GPU library
#                    ├─ vision-packages ─┬─────────────────────────► production       vision server
#                    │                   ├─ models, h100-packages ─► h100-optimized
#                    │                   └─ development-packages ──► development
#                    └─ queue-code, vision-code                      our own code, the last layer of each server's image
#
# What is large comes first: models, then the packages of others, which hang on their lock alone. Our own code is a small layer on
# top: a change of it installs and fetches nothing again, and that layer is all that is pushed and pulled.
#
# pip keeps no cache here: neither in a layer (--no-cache-dir, so there is nothing to purge either) nor in a cache mount, which
# would stay on the builder, unchecked, and differ from runner to runner. A second build is quick because the layers are kept.
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


# ---- builder: pip and what our own code is built with; nothing of this stage but /opt/venv goes on
FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.txt requirements/
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt


# Our own code, installed beside /opt/venv with nothing else, to be copied into it: buildah would not notice that a wheel mounted
# into a RUN has changed. It has the packages that are here: the queue's no vision_server, the vision server's no queue_server.
FROM builder AS queue-code
COPY pyproject.toml README.md ./
COPY clients clients
COPY serving serving
COPY queue_server queue_server
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --no-warn-script-location --root /installed .


FROM builder AS vision-code
COPY pyproject.toml README.md ./
COPY clients clients
COPY serving serving
COPY vision_server vision_server
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --no-warn-script-location --root /installed .


FROM builder AS queue-packages
COPY requirements/queue.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/queue.txt


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


# Models that the image brings, by the names of VISION_DETECTOR and VISION_DESCRIBER with spaces between them. Of our own
# code only what fetching takes is here: a change of anything else fetches nothing again.
FROM vision-packages AS models
COPY serving/__init__.py serving/logs.py serving/settings.py serving/
COPY vision_server/__init__.py vision_server/network.py vision_server/prefetch.py vision_server/settings.py \
     vision_server/weights.py vision_server/
COPY vision_server/describers/__init__.py vision_server/describers/addresses.py vision_server/describers/
COPY vision_server/engines/__init__.py vision_server/engines/choose.py vision_server/engines/engine.py vision_server/engines/
ARG PREFETCH_MODELS=""
ARG HF_ENDPOINT=https://huggingface.co
# The token of gated ones is a BuildKit secret (--secret id=hf_token,src=FILE), which no layer and no history has.
RUN --mount=type=secret,id=hf_token mkdir -p /models \
    && if [ -n "$PREFETCH_MODELS" ]; then \
         python -m vision_server.prefetch --into /models $PREFETCH_MODELS; \
       fi


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
# Healthy: the models answer. Large ones load for 5 to 10 minutes; failures do not count until then, a success does at once.
HEALTHCHECK --interval=10s --timeout=15s --start-period=15m --retries=3 \
    CMD ["sh", "-c", "exec ai4thai health --grpc localhost:$VISION_SERVICE_PORT --timeout 5"]
CMD ["python", "-m", "vision_server"]


FROM vision AS production
COPY --from=vision-packages /opt/venv /opt/venv
COPY --from=vision-code /installed/opt/venv /opt/venv
RUN pip check --no-cache-dir
USER 10001:10001
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="AI4Thai vision server" \
      org.opencontainers.image.description="YOLO and a vision-language model behind gRPC and HTTP on port 2001." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM vision-packages AS h100-packages
COPY requirements/h100.txt requirements/tensorrt.txt requirements/
# nvImageCodec and TensorRT need CUDA: the cpu variant of this target, which is there to be tried without a GPU, goes without.
# TensorRT's libraries lie at NVIDIA, not on PyPI, and have no hash: requirements/tensorrt.txt. Its front package is built here by
# the tools of build.txt: in isolation pip would take the newest ones of the day.
ARG NVIDIA_INDEX=https://pypi.nvidia.com
RUN if [ "$ACCELERATOR" = gpu ]; then \
      pip install --no-cache-dir --no-deps --require-hashes -r requirements/h100.txt \
      && pip install --no-cache-dir --no-deps --no-build-isolation --extra-index-url "$NVIDIA_INDEX" \
           -r requirements/tensorrt.txt; \
    fi


# ---- h100-optimized: one H100, or a MIG slice of it. Half precision (bf16 for describers, fp16 for detectors) and CUDA graphs are
# what the server does on any GPU; TensorRT is taken for a detector once `ai4thai models export NAME --engine engine` has built it.
# malloc is set by the server itself (serving/process.py, measured), for glibc: another malloc would undo that. MALLOC_ARENA_MAX=4
# was tried: 758 instead of 776 MB after 12-megapixel pictures, which is within the noise. nvImageCodec is at hand for own code;
# the server decodes JPEGs by nvJPEG (torchvision).
FROM vision AS h100-optimized
ENV VISION_PREFETCHED_DIR=/models \
    VISION_GPU_DECODE=true \
    VISION_MAX_BATCH=32
COPY --from=models /models /models
COPY --from=h100-packages /opt/venv /opt/venv
COPY --from=vision-code /installed/opt/venv /opt/venv
RUN pip check --no-cache-dir
USER 10001:10001
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="AI4Thai vision server for the H100" \
      org.opencontainers.image.description="YOLO and a vision-language model behind gRPC and HTTP on port 2001; TensorRT, nvJPEG." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM vision-packages AS development-packages
COPY requirements/dev.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/dev.txt


# ---- development: tools and tests; everything belongs to the user, so that pip and make may change it
FROM vision AS development
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates=20* curl=7.88.* git=1:2.39.* make=4.3-* \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
COPY --from=development-packages --chown=10001:10001 /opt/venv /opt/venv
COPY --chown=10001:10001 pyproject.toml README.md ./
COPY --chown=10001:10001 clients clients
COPY --chown=10001:10001 serving serving
COPY --chown=10001:10001 vision_server vision_server
COPY --chown=10001:10001 queue_server queue_server
USER 10001:10001
# The source as it lies in /app, where a checkout is mounted over it: docker run -v "$PWD:/app" …
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --editable . && pip check \
    # So that `make VENV=/opt/venv test` finds it ready.
    && cp pyproject.toml /opt/venv/.ready
HEALTHCHECK NONE
CMD ["python", "-m", "pytest"]


# ---- queue: the queue server; with `python -m queue_server.worker` as its command, the worker
FROM base AS queue
ENV QUEUE_WORKER_PORT=2003
COPY --from=queue-packages /opt/venv /opt/venv
COPY --from=queue-code /installed/opt/venv /opt/venv
RUN pip check --no-cache-dir
EXPOSE 2003
USER 10001:10001
# Of the server. A worker has no port; its check is: ai4thai health --worker
HEALTHCHECK --interval=10s --timeout=15s --start-period=1m --retries=3 \
    CMD ["sh", "-c", "exec ai4thai health --grpc localhost:$QUEUE_WORKER_PORT --timeout 5"]
CMD ["python", "-m", "queue_server"]
ARG VERSION=dev
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="AI4Thai queue server and worker" \
      org.opencontainers.image.description="Jobs that survive, behind gRPC and HTTP on port 2003; the worker by another command." \
      org.opencontainers.image.licenses="AGPL-3.0-or-later" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
