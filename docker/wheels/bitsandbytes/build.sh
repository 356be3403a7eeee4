# bitsandbytes' native library for one gfx alone, found at run time by the release in its name.
HIP_PATH=$(hipconfig --path)
HIPCXX=$(hipconfig --hipclangpath)/clang++
export HIP_PATH HIPCXX CC=gcc CXX=g++
cmake -S . -B build -G Ninja -DCOMPUTE_BACKEND=hip "-DBNB_ROCM_ARCH=$GFX" "-DROCM_VERSION=$ROCM_SHORT" \
  -DCMAKE_BUILD_TYPE=MinSizeRel -DCMAKE_HIP_FLAGS=--offload-compress
cmake --build build
BNB_SKIP_CMAKE=1 pip wheel . --no-deps --no-build-isolation --wheel-dir "$WHEELS"
