# gvpo with the PyTorch backend for NVIDIA GPUs.
#
#   docker build -t gvpo .
#   docker run --gpus all --shm-size 8g -v "$PWD":/work gvpo train config.toml
#
# Not tested on a GPU yet. The torch wheel contains CUDA, so the base image needs only Python.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY constraints.txt /src/
# Install torch first: it is the largest layer and changes least.
RUN grep -E '^torch==' /src/constraints.txt > /src/torch.txt && pip install -r /src/torch.txt

COPY pyproject.toml hatch_build.py README.md LICENSE /src/
COPY gvpo /src/gvpo
COPY gvpo_core /src/gvpo_core
COPY backends /src/backends
COPY adapters /src/adapters
RUN pip install -c /src/constraints.txt "/src[torch,rewards]" && python -c "import gvpo, gvpo_torch"

RUN useradd --create-home --uid 1000 gvpo
USER gvpo
WORKDIR /work
ENTRYPOINT ["gvpo"]
CMD ["doctor"]
