# The image that serves packages of the runtime `embedded`: the real Triton Inference Server out of the nvidia-pytriton
# wheel, PyTorch and trtbuild. One file for CPU and NVIDIA hosts; only the torch build differs.
#
#   mkdir -p dist && python -m build --wheel --outdir dist .
#   docker build -f docker/serve.Dockerfile -t trtbuild-serve \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# Build context: constraints.txt and a folder with the trtbuild wheel (WHEEL_DIR).
# Without a network:    --build-context wheelhouse=FOLDER_OF_WHEELS --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheelhouse
# With a private index: --secret id=pip.conf,src=PIP_CONF   (a mount, never a layer; a build argument would stay in the history)
#
# BASE_IMAGE needs Python 3.11 or 3.12 with the venv module and the shared libpython, and glibc 2.35 or newer.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# Empty unless `--build-context wheelhouse=...` puts a folder in its place.
FROM scratch AS wheelhouse

FROM ${BASE_IMAGE}

# Numeric, so that Kubernetes' runAsNonRoot can check it; group 0, so that a platform may choose another user id.
RUN ["useradd", "--uid", "10001", "--gid", "0", "--no-create-home", "--home-dir", "/tmp", "--shell", "/usr/sbin/nologin", "trtbuild"]

# Triton's python stub loads the shared libpython: fail here, not at the first start.
RUN ["python3", "-c", "import ctypes, sysconfig; ctypes.CDLL(sysconfig.get_config_var('INSTSONAME'))"]
RUN ["python3", "-m", "venv", "/opt/trtbuild"]
COPY constraints.txt /opt/trtbuild/constraints.txt

# Largest and most stable first. torch goes first and alone, and constraints.txt leaves it out, because its CPU and CUDA
# builds share a version. `pip` reads PIP_NO_INDEX and PIP_FIND_LINKS from the environment.
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/trtbuild/bin/pip install --no-cache-dir \
      --constraint /opt/trtbuild/constraints.txt \
      ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "torch==${TORCH_VERSION}"

RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/trtbuild/bin/pip install --no-cache-dir \
      --constraint /opt/trtbuild/constraints.txt numpy nvidia-pytriton safetensors transformers

# Last, because it changes most often: the wheel itself and its small dependencies.
ARG WHEEL_DIR=dist
COPY ${WHEEL_DIR}/ /opt/trtbuild/wheel/
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    /opt/trtbuild/bin/pip install --no-cache-dir --no-deps /opt/trtbuild/wheel/trtbuild-*.whl \
 && PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/trtbuild/bin/pip install --no-cache-dir \
      --constraint /opt/trtbuild/constraints.txt "trtbuild[embedded,serve]" \
 && /opt/trtbuild/bin/pip check

# Everything that is written at run time goes below /tmp, so that the root file system may be read-only.
# The NVIDIA variables ask the NVIDIA container runtime for the driver; without that runtime they mean nothing.
ENV PATH=/opt/trtbuild/bin:${PATH} \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG BASE_IMAGE
ARG VERSION
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="trtbuild-serve" \
      org.opencontainers.image.description="Triton Inference Server with trtbuild's embedded runtime" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

USER 10001:0
WORKDIR /tmp
EXPOSE 8000 8001 8002

# No curl in the base image, and http.client, unlike urllib, never asks a proxy for 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD ["python3", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/v2/health/ready'); sys.exit(c.getresponse().status != 200)"]

# Exec form: `trtbuild serve` is process 1, gets SIGTERM itself, ends Triton and then itself. Its supervisor reaps what Triton
# leaves, so no init process is needed; `docker run --init` does no harm. Arguments after the image's name replace /package;
# an option given there wins over the same option here.
ENTRYPOINT ["trtbuild", "serve", "--address=0.0.0.0", "--startup-timeout=600", "--log=/tmp/trtbuild-serve.log"]
CMD ["/package"]
