# syntax=docker/dockerfile:1
# One image for every service and role:
#   docker run holdfast services.inventory --role api      (reservation, analytics; api, worker)
#   docker run holdfast shared.migrate inventory --phase pre
#   docker run holdfast shared.topics
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /build
COPY deploy/image/build.lock deploy/image/runtime.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --require-hashes --no-deps -r build.lock && \
    python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --require-hashes --no-deps --target /opt/holdfast/lib -r runtime.lock
COPY protos protos
RUN mkdir -p /opt/holdfast/app && python -m grpc_tools.protoc -Iprotos \
    --python_out=/opt/holdfast/app --grpc_python_out=/opt/holdfast/app $(find protos -name '*.proto')
COPY shared /opt/holdfast/app/shared
COPY services /opt/holdfast/app/services
COPY deploy/image/sbom.py ./
ARG VERSION=0.1.0
# Compiled here: the root file system is read-only where it runs.
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/holdfast && \
    python sbom.py /opt/holdfast/lib ${VERSION} > /opt/holdfast/sbom.cdx.json

FROM python:${PYTHON}
COPY --from=build /opt/holdfast /opt/holdfast
WORKDIR /opt/holdfast/app
ENV PYTHONPATH=/opt/holdfast/app:/opt/holdfast/lib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 50051 50050 9464
ENTRYPOINT ["python", "-m"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Holdfast" \
      org.opencontainers.image.description="Keeps stock right under load: inventory, reservations and stock analytics." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
