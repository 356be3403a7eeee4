# FlashAttention for ROCm, by the backend that wheel.toml's variant sets.
if [ "${FLASH_ATTENTION_TRITON_AMD_ENABLE:-FALSE}" != TRUE ]; then
  # A build sees no GPU, so the arch has to be told.
  export GPU_ARCHS="$GFX"
  git submodule update --init --depth 1 csrc/composable_kernel
fi
pip wheel . --no-deps --no-build-isolation --wheel-dir "$WHEELS"
