# The CPU stand-in with Debian's own HIP toolchain: it compiles for any gfx without a GPU. torch stays a CPU build, so an
# image for ROCm that is built on it fails in its verify stage, as it should.
ARG CPU
FROM ${CPU}
ARG SUITE
SHELL ["/bin/sh", "-eu", "-c"]

# The development suite has libraries under new package names whose files the old ones own too: --force-overwrite.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    echo "deb http://deb.debian.org/debian ${SUITE} main" > /etc/apt/sources.list.d/hip.list; \
    apt-get -o Acquire::Check-Valid-Until=false update -qq; \
    DEBIAN_FRONTEND=noninteractive apt-get -o Dpkg::Options::=--force-overwrite install -y -qq --no-install-recommends \
      --target-release "${SUITE}" ccache cmake g++ gcc git hipcc libamdhip64-dev libhipblas-dev librocblas-dev ninja-build \
      patch rocm-device-libs-21; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
