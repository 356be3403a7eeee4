"""Configuration of the `serve` workload: which program serves what an export made, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radeon_stack.contracts.sections import Listens, TakesSource

KEY_FILE = "api-key"  # in the run directory
HEALTH = "/health"  # the one path that is answered without the key
ANY: Literal["auto"] = "auto"
LLAMA_CPP: Literal["llama.cpp"] = "llama.cpp"
VLLM: Literal["vllm"] = "vllm"


class ServeConfig(TakesSource, Listens):
    """Everything the `serve` workload can be told."""

    server: Literal["auto", "llama.cpp", "vllm"] = Field(
        ANY, description="'auto': llama.cpp where there is a GGUF file, else vllm for the merged model"
    )
    quantization: str = Field(
        ANY,
        pattern=r"^[a-z0-9_]{2,16}$",
        description="of the GGUF file: q4_k_m, bf16 …; 'auto': q8_0 where there is one, which answers as 16 bit does",
    )
    name: str = Field("", max_length=200, description='what clients call the model; "": as its folder is called')
    context: int = Field(4096, ge=0, le=1 << 24, description="tokens of a whole conversation; 0: what the model knows")
    threads: int = Field(0, ge=0, le=1024, description="on the CPU; 0: as many as there are cores")
    ready_seconds: int = Field(900, ge=1, le=86400, description="it may take to load and to answer a first question")
