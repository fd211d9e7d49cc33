# `fieldmark serve` on a CPU, as a user without rights, on a root that may be read-only.
#
#   docker build -t fieldmark .
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -v ./runs/mine:/model:ro fieldmark
#
# The usual torch for Linux brings CUDA, some gigabytes. For the CPU build give the index that pytorch.org names for it:
#   docker build --build-arg TORCH_INDEX=URL -t fieldmark .
FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/fieldmark
COPY constraints.txt ./
RUN /opt/fieldmark/bin/pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/fieldmark/bin/pip install -c constraints.txt ".[serve,heic]" onnxruntime

FROM python:3.12-slim
COPY --from=build /opt/fieldmark /opt/fieldmark
# All that is written goes to /tmp: compiled loops and fonts' lists. Nothing is fetched.
ENV PATH=/opt/fieldmark/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp/cache \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["fieldmark", "serve", "/model", "--host", "0.0.0.0"]
