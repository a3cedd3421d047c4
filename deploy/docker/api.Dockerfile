# The image of the API: small, without what only work needs. From the root of the repository:
#   docker build -f deploy/docker/api.Dockerfile -t espalier-api .
# What is installed changes less often than the code: it comes first, in layers of its own.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS requirements
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/espalier
ENV PATH=/opt/espalier/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deploy/docker/requirements.py deploy/docker/
RUN python3 deploy/docker/requirements.py pyproject.toml api postgres objects > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt

FROM requirements AS code
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/espalier/bin:$PATH PYTHONUNBUFFERED=1 ESPALIER_HOME=/var/lib/espalier
RUN useradd --uid 10001 --user-group --create-home espalier && install -d -o espalier -g espalier /var/lib/espalier
COPY --from=requirements /opt/espalier /opt/espalier
COPY --from=code /wheels /tmp/wheels
RUN pip install --no-deps --no-cache-dir /tmp/wheels/*.whl
# By number: Kubernetes holds no name against runAsNonRoot.
USER 10001:10001
WORKDIR /home/espalier
EXPOSE 8700
ENTRYPOINT ["espalier"]
CMD ["serve", "api", "--host", "0.0.0.0"]
