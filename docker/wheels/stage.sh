#!/bin/sh
# What every wheel stage does around its own build.sh: settings, tools by hash, source by hash or commit.
# In: $BUILD/{build.sh,tools.txt,source.txt}, GIT and COMMIT for a git source, JOB_MEMORY_MIB, what wheel.toml sets.
# Out: one wheel in $WHEELS. The folders are an image's; an environment without one names its own.
set -eu

: "${BUILD:=/build}" "${WHEELS:=/wheels}" "${PYTHON_BIN:=/opt/venv/bin}" "${CACHE:=/var/cache/radeon-stack}"
export WHEELS PATH="$PYTHON_BIN:$PATH" PIP_CACHE_DIR="$CACHE/pip" PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca GIT_SSL_CAINFO=/run/secrets/ca; fi
if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi
export SOURCE_DATE_EPOCH=315532800 # the first moment a zip can tell: the same source gives the same wheel

# As many jobs as there are cores, and memory for.
cores=$(nproc)
room=$(awk -v job="$JOB_MEMORY_MIB" '/^MemAvailable/ {print int($2 / 1024 / job)}' /proc/meminfo)
jobs=$((room < cores ? room : cores))
jobs=$((jobs > 1 ? jobs : 1))
export MAX_JOBS=$jobs CMAKE_BUILD_PARALLEL_LEVEL=$jobs
echo "building with $jobs jobs: $cores cores, memory for $room"

if command -v ccache >/dev/null; then
  export CCACHE_DIR="$CACHE/ccache" CCACHE_MAXSIZE=20G CCACHE_NOHASHDIR=1 CCACHE_BASEDIR="$BUILD"
  export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_HIP_COMPILER_LAUNCHER=ccache
fi

mkdir -p "$WHEELS" "$BUILD/source"
cd "$BUILD"
if [ -s tools.txt ]; then pip install --quiet --no-deps --require-hashes --requirement tools.txt; fi
if [ -n "${GIT:-}" ]; then
  git -C source init --quiet
  git -C source fetch --quiet --depth 1 "$GIT" "$COMMIT"
  git -C source checkout --quiet --detach FETCH_HEAD
else
  # PEP 517's hook for metadata is run by `pip download`, so the tools are there already.
  pip download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes --requirement source.txt --dest sdist
  tar --extract --file sdist/*.tar.gz --directory source --strip-components 1
fi
for patch in patches/*.patch; do
  if [ -f "$patch" ]; then patch --directory source --strip 1 --input "$BUILD/$patch"; fi
done

cd source
. "$BUILD/build.sh"

set -- "$WHEELS"/*.whl
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
  echo "expected one wheel in $WHEELS: $*" >&2
  exit 1
fi
sha256sum "$1"
