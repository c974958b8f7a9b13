# A rollout server: SGLang of the version whose HTTP contract is spoken (rollout_sglang/client/contract.py), and this package's
# plugins, which answer what weights it holds.
# Not built yet: the project has no machine with a container engine.
#
#     docker build -f containers/server.Dockerfile -t vespo-server .
#     enroot import -o vespo-server.sqsh dockerd://vespo-server
ARG BASE=lmsysorg/sglang:v0.5.23
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/vespo_megatron
COPY setup.py pyproject.toml README.md LICENSE ./
COPY vespo_megatron vespo_megatron
# Without dependencies: SGLang pins its own torch and transformers, and the plugins need nothing else.
RUN pip install --no-deps . && python -c "import importlib.metadata as m; \
    assert any(e.name == 'vespo_weights' for e in m.entry_points(group='sglang.srt.plugins'))"
