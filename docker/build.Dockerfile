# The environment that runs `trtbuild build`: compression, evaluation, the embedded engine and Triton for verification.
# For pipelines with no human present; the recipe and the checkpoint are mounted at /work, the store is kept in /cache.
#
#   mkdir -p dist && python -m build --wheel --outdir dist .
#   docker build -f docker/build.Dockerfile -t trtbuild-build \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#   docker run --rm --user "$(id -u):0" -v "$PWD:/work" -v trtbuild-cache:/cache trtbuild-build build recipe.yaml -o package
#
# Context, arguments and base image: as in serve.Dockerfile, where they are explained.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM scratch AS wheelhouse

FROM ${BASE_IMAGE}

RUN ["useradd", "--uid", "10001", "--gid", "0", "--no-create-home", "--home-dir", "/tmp", "--shell", "/usr/sbin/nologin", "trtbuild"]
RUN ["python3", "-c", "import ctypes, sysconfig; ctypes.CDLL(sysconfig.get_config_var('INSTSONAME'))"]
RUN ["python3", "-m", "venv", "/opt/trtbuild"]
COPY constraints.txt /opt/trtbuild/constraints.txt

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
      --constraint /opt/trtbuild/constraints.txt \
      accelerate numpy nvidia-modelopt nvidia-pytriton pyarrow safetensors transformers

ARG WHEEL_DIR=dist
COPY ${WHEEL_DIR}/ /opt/trtbuild/wheel/
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    /opt/trtbuild/bin/pip install --no-cache-dir --no-deps /opt/trtbuild/wheel/trtbuild-*.whl \
 && PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/trtbuild/bin/pip install --no-cache-dir \
      --constraint /opt/trtbuild/constraints.txt "trtbuild[build,serve]" \
 && /opt/trtbuild/bin/pip check

# Writable for any user of group 0, and so is a named volume that starts from it.
RUN ["install", "--directory", "--mode=0775", "--owner=10001", "--group=0", "/cache"]

# No HF_HUB_OFFLINE here: `model.path` may be a hub id. A token comes with `docker run -e HF_TOKEN`, never from a layer.
ENV PATH=/opt/trtbuild/bin:${PATH} \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG BASE_IMAGE
ARG VERSION
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="trtbuild-build" \
      org.opencontainers.image.description="From a Hugging Face checkpoint to a proven Triton deployment" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

USER 10001:0
WORKDIR /work
# Nothing listens: the image runs one command and ends with its exit code.
HEALTHCHECK NONE
ENTRYPOINT ["trtbuild"]
CMD ["--help"]
