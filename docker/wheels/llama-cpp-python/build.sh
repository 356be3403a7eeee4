# llama.cpp with its Python binding. HIP_PATH and the compiler are the base's: /opt/rocm, or /usr on Debian.
set -- "-DGGML_NATIVE=OFF" \
  "-DLLAVA_BUILD=OFF" \
  "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON" # a wheel stores links as copies: one name a library, not three
# Not for the builder's own processor, and yet with what every one has that takes a card with ROCm (Haswell and Zen, the
# first with PCIe atomics). A build that is to be the same again, as ours is, would have SSE2 alone.
if [ "$(uname -m)" = x86_64 ]; then
  for set in SSE42 AVX AVX2 BMI2 FMA F16C; do
    set -- "$@" "-DGGML_$set=ON"
  done
fi
if [ -n "${GFX:-}" ]; then
  HIP_PATH=$(hipconfig --path)
  HIPCXX=$(hipconfig --hipclangpath)/clang++
  export HIP_PATH HIPCXX
  # GPU_TARGETS is today's name, AMDGPU_TARGETS the one before it. Left out, the local GPU is asked: a build has none.
  set -- "$@" "-DGGML_HIP=ON" "-DGPU_TARGETS=$GFX" "-DAMDGPU_TARGETS=$GFX"
fi
# llama.cpp's converter is of the same source as what loads its files, so it travels with it.
mkdir -p llama_cpp/converter/gguf-py
cp -R vendor/llama.cpp/convert_hf_to_gguf.py vendor/llama.cpp/conversion llama_cpp/converter/
cp -R vendor/llama.cpp/gguf-py/gguf llama_cpp/converter/gguf-py/
export CC=gcc CXX=g++ CMAKE_ARGS="$*"
# ggml installs itself at the wheel's root once more; what Python loads is in llama_cpp/lib.
pip wheel . --no-deps --no-build-isolation --wheel-dir "$WHEELS" \
  --config-settings "wheel.exclude=lib/**;bin/**;include/**;share/**"
