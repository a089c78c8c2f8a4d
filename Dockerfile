# syntax=docker/dockerfile:1
# The parts without torch: gateway and controller. Everything that needs a model is in Dockerfile.gpu.
#
#   docker build --build-arg PYTHON_DIGEST=sha256:... --build-arg VERSION=0.1.0 -t steersman .
#
# Get the digest with: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON_DIGEST

FROM docker.io/library/python:3.11-slim-bookworm@${PYTHON_DIGEST} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/steersman
COPY pyproject.toml constraints.txt scripts/image_requirements.py ./
RUN python image_requirements.py pyproject.toml gateway controller > requirements.txt \
    && /opt/steersman/bin/pip install --no-compile -c constraints.txt -r requirements.txt "psycopg[binary]" \
    && /opt/steersman/bin/pip uninstall -y pip setuptools
# The code alone, as plain packages: the last stage copies it after the libraries.
COPY README.md ./
COPY steersman steersman
COPY services services
COPY training training
RUN python -m pip install --no-compile --no-deps --target /opt/code .

FROM docker.io/library/python:3.11-slim-bookworm@${PYTHON_DIGEST} AS runtime
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="steersman" \
      org.opencontainers.image.description="Steersman: gateway and controller" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/steersman/bin:$PATH \
    PYTHONPATH=/opt/code \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY --from=build /opt/steersman /opt/steersman
COPY --from=build /opt/code /opt/code
# A number, so that Kubernetes can see that it is not root. The root file system may be read-only; /tmp is a volume.
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["python", "-m"]
CMD ["services.gateway"]
