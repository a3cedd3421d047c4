# The image of whatever works on jobs: dispatcher, Ray's nodes, MLflow. From the root of the repository:
#   docker build -f deploy/docker/worker.Dockerfile -t espalier-worker .
#   docker build -f deploy/docker/worker.Dockerfile --build-arg TORCH_OPTIONS= -t espalier-worker-cuda .
# What is installed changes less often than the code: it comes first, in layers of its own.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS requirements
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
RUN python3 -m venv /opt/espalier
ENV PATH=/opt/espalier/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deploy/docker/requirements.py deploy/docker/
# The build for CPUs, from PyTorch's own index. Without options pip takes the build for CUDA (several GB).
ARG TORCH_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN pip install ${TORCH_OPTIONS} "$(grep '^torch==' constraints.txt)"
RUN python3 deploy/docker/requirements.py pyproject.toml worker postgres objects kubernetes > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt

FROM requirements AS code
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/espalier/bin:$PATH PYTHONUNBUFFERED=1 ESPALIER_HOME=/var/lib/espalier DS_BUILD_OPS=0
RUN useradd --uid 10001 --user-group --create-home espalier && install -d -o espalier -g espalier /var/lib/espalier
COPY --from=requirements /opt/espalier /opt/espalier
COPY --from=code /wheels /tmp/wheels
RUN pip install --no-deps --no-cache-dir /tmp/wheels/*.whl
# By number: Kubernetes holds no name against runAsNonRoot.
USER 10001:10001
WORKDIR /home/espalier
CMD ["espalier", "serve", "dispatcher"]
