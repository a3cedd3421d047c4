# The image of the API: small, without what only work needs. From the root of the repository:
#   docker build -f deploy/docker/api.Dockerfile -t espalier-api .
# What is installed changes less often than the code, and comes first.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/espalier
ENV PATH=/opt/espalier/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deploy/docker/requirements.py deploy/docker/
RUN python3 deploy/docker/requirements.py pyproject.toml api postgres > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/espalier/bin:$PATH PYTHONUNBUFFERED=1 ESPALIER_HOME=/var/lib/espalier
RUN useradd --uid 10001 --create-home espalier && install -d -o espalier -g espalier /var/lib/espalier
COPY --from=build /opt/espalier /opt/espalier
USER espalier
WORKDIR /home/espalier
EXPOSE 8700
ENTRYPOINT ["espalier"]
CMD ["serve", "api", "--host", "0.0.0.0"]
