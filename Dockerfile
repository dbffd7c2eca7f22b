# One image for every part: `docker run IMAGE up`, `… router`, `… worker`, as `satherd` outside.
# docs/operating.md says how to use it, and what of it has been tried.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/satherd
ENV PATH=/opt/satherd/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# llama.cpp takes minutes, so its layer comes first and depends on nothing that changes often. The
# image may run on another machine than this one, hence no -march=native but what every x86-64
# processor since 2015 can do (AVX2). For an older one: --build-arg LLAMA_CPU="-DGGML_NATIVE=OFF".
ARG LLAMA_VERSION=0.3.36
ARG LLAMA_CPU="-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
COPY worker/llama_build.cmake worker/
RUN CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=/src/worker/llama_build.cmake ${LLAMA_CPU}" \
    SKBUILD_BUILD_TARGETS=llama \
    pip install llama-cpp-python==${LLAMA_VERSION}

# Then what pyproject.toml asks for, which changes seldom, and last our own code, which changes often.
COPY pyproject.toml README.md ./
RUN pip install ".[router,worker]"
COPY . .
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON_VERSION}-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 satherd \
    && useradd --uid 10001 --gid satherd --home-dir /data --no-create-home \
        --shell /usr/sbin/nologin satherd \
    && install -d -o satherd -g satherd -m 0700 /data
COPY --from=build /opt/satherd /opt/satherd
ENV PATH=/opt/satherd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SATHERD_DATA_DIR=/data \
    SATHERD_HOST=0.0.0.0 \
    SATHERD_PORT=8000
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["satherd"]
CMD ["up"]
