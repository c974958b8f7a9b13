# The trainer: megatron-core, Transformer Engine and this package.
# Not built yet: the project has no machine with a container engine. Written after the packages' own installation pages;
# report what has to change.
#
#     docker build -f containers/trainer.Dockerfile -t vespo-trainer .
#     enroot import -o vespo-trainer.sqsh dockerd://vespo-trainer          # then slurm.container_image: …/vespo-trainer.sqsh
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/vespo_megatron
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends git build-essential && rm -rf /var/lib/apt/lists/*
COPY setup.py pyproject.toml README.md LICENSE ./
COPY vespo_megatron vespo_megatron
# The image's own torch is kept: Transformer Engine is compiled against it.
RUN python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" > /tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt '.[train]' \
    && pip install --constraint /tmp/constraints.txt --no-build-isolation 'transformer-engine[pytorch,core_cu12]>=2.9,<2.12' \
    && vespo-megatron --help > /dev/null
COPY examples examples
# `vespo-megatron doctor` says what of a run would fail; run it on a node, where the GPUs are.
CMD ["vespo-megatron", "doctor"]
