# fastbert in a container; docs/index.md has the commands. BASE_IMAGE may be any image with Python 3.10 or newer, pip and
# apt-get, as root. Where it has torch, for GPUs perhaps, that torch stays; else pip installs TORCH.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# With g++ DeepSpeed compiles an operation, in the first run on a CPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# With a second package index, which has CPU builds, pip takes torch's CPU wheel.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
# Where the image has Debian's Python, pip installs nothing without this.
ARG PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip show --quiet torch || python3 -m pip install --no-cache-dir "${TORCH}"

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels/
COPY fastbert fastbert/
# The constraint keeps pip from replacing torch: a version that fastbert does not support is an error.
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > torch.txt \
    && python3 -m pip install --no-cache-dir --constraint torch.txt ./kernels .

# Any user may run the image: `docker run --user`. Libraries keep caches in HOME, and ask for a user's name.
RUN mkdir --mode=1777 /caches && useradd --home-dir /caches fastbert
ENV HOME=/caches USER=fastbert
USER fastbert
WORKDIR /work
ENTRYPOINT ["fastbert"]
