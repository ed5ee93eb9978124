# syntax=docker/dockerfile:1.7
# Two images of the same code, each with a user that is not root:
#   docker build --tag fp8lm .                     for GPUs with FP8
#   docker build --tag fp8lm-cpu --target cpu .    to try it out, small, without a GPU
# --build-arg FP8LM_COMMIT="$(git rev-parse HEAD)" lets runs record the commit, for .git stays out.
# How to run them: docs/user-guide/environment.md.

# ---- CPU ----------------------------------------------------------------------------------------
FROM python:3.12.13-slim-bookworm AS cpu
ARG TORCH_VERSION=2.13.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
# From what changes seldom to what changes often: PyTorch, packages, code.
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu "torch==${TORCH_VERSION}+cpu"
COPY docker/requirements.txt /tmp/requirements.txt
RUN pip install --no-deps --requirement /tmp/requirements.txt && pip check

WORKDIR /opt/fp8lm
COPY LICENSE README.md pretrain_gpt.py pyproject.toml ./
COPY configs/ configs/
COPY scripts/ scripts/
COPY tools/ tools/
COPY fp8lm/ fp8lm/
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home --no-log-init --uid 10001 fp8lm \
    && install --directory --owner=fp8lm data runs
ARG FP8LM_COMMIT=
ENV FP8LM_COMMIT=${FP8LM_COMMIT} FP8LM_PYTHON=/usr/local/bin/python
USER 10001
CMD ["python", "pretrain_gpt.py", "--config", "configs/gpt_tiny.yaml"]

# ---- GPU ----------------------------------------------------------------------------------------
# NVIDIA's build of PyTorch, with libraries that fit each other. Users report of this tag: Python
# 3.12.3, torch 2.13.0a0 (8145d630e8), CUDA 13.3, NCCL 2.30.5, transformer-engine 2.16.0, driver 580
# or newer. 26.04 and 26.05 have torch 2.12.0a0; 26.08 has 2.14.0a0.
FROM nvcr.io/nvidia/pytorch:26.06-py3 AS ngc

# NVIDIA's apex, from source: the package of that name on PyPI is another project.
FROM ngc AS apex
ARG APEX_COMMIT=9e3568a6f90fbc1996a06f8f9e99310bdaf2253a
ARG TORCH_CUDA_ARCH_LIST="8.9 9.0 10.0 12.0"
ENV APEX_CPP_EXT=1 APEX_CUDA_EXT=1 NVCC_APPEND_FLAGS="--threads 4"
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels \
    "git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"

# An environment on top of the image's own, which keeps torch and transformer-engine as they are.
FROM ngc AS gpu-packages
# The image pins its own packages through this variable, for those beneath; ours lie above them.
ENV PIP_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv --system-site-packages /opt/venv
COPY docker/requirements.txt /tmp/requirements.txt
RUN /opt/venv/bin/pip install --no-deps --requirement /tmp/requirements.txt
RUN --mount=type=bind,from=apex,source=/wheels,target=/wheels \
    /opt/venv/bin/pip install --no-deps --force-reinstall /wheels/*.whl
# The image's torchrun starts the interpreter beneath, which sees none of these packages.
COPY --chmod=755 <<'EOF' /opt/venv/bin/torchrun
#!/opt/venv/bin/python
from torch.distributed.run import main

main()
EOF

FROM ngc AS gpu
COPY --from=gpu-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} FP8LM_PYTHON=/opt/venv/bin/python PYTHONUNBUFFERED=1
WORKDIR /opt/fp8lm
COPY LICENSE README.md pretrain_gpt.py pyproject.toml ./
COPY configs/ configs/
COPY scripts/ scripts/
COPY tools/ tools/
COPY fp8lm/ fp8lm/
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --no-log-init --uid 10001 fp8lm \
    && install --directory --owner=fp8lm data runs
ARG FP8LM_COMMIT=
ENV FP8LM_COMMIT=${FP8LM_COMMIT}
USER 10001
CMD ["python", "-m", "fp8lm.doctor"]
