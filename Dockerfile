# docker build -t mae . && docker run --gpus all --shm-size=16g --user "$(id -u):$(id -g)" -v "$PWD:/here" mae pretrain
# Any image with Python 3.11 or newer serves as base; without a GPU: docker build --build-arg BASE=python:3.12-slim -t mae .
ARG BASE=pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime
FROM ${BASE}

WORKDIR /opt/mae
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY mae mae
COPY configs configs
RUN pip install --no-cache-dir '.[jpeg]'

# runs go to the folder that is mounted at /here; caches where every user may write, for --user may name any
RUN useradd --create-home mae && mkdir /here && chown mae /here
USER mae
WORKDIR /here
ENV USER=mae XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config TORCHINDUCTOR_CACHE_DIR=/tmp/inductor PYTHONUNBUFFERED=1
ENTRYPOINT ["mae"]
