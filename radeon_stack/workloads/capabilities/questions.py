"""All questions, in the order they are asked: what may take the machine down comes last."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from radeon_stack.errors import UsageError
from radeon_stack.workloads.capabilities.steps import Question

HERE = "radeon_stack.workloads.capabilities"
HEAD_DIMS = (64, 128, 256)
RANKS = (8, 16, 64)
TRANSFORMERS = ("torch", "transformers.models.qwen3_moe.modeling_qwen3_moe")


def all_questions() -> tuple[Question, ...]:
    """Every question there is."""
    asked = (_attention(), _products(), _fp8(), _triton(), _bitsandbytes(), _experts(), _lora(), _soak(), _several())
    return tuple(question for group in asked for question in group)


def chosen(wanted: Sequence[str] | str, known: Sequence[Question] | None = None) -> tuple[Question, ...]:
    """The questions that names or patterns mean, in their order. UsageError when one means none."""
    found = all_questions() if known is None else tuple(known)
    if wanted == "all":
        return found
    patterns = [wanted] if isinstance(wanted, str) else wanted
    names = [question.name for question in found]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise UsageError(f"no question '{pattern}'; did you mean '{(near or names)[0]}'?", where="config.questions")
    return tuple(q for q in found if any(fnmatch.fnmatchcase(q.name, pattern) for pattern in patterns))


def _attention() -> Iterator[Question]:
    for name in ("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "flash_attn", "eager"):
        flash_attn, everywhere = name == "flash_attn", name in ("sdpa", "sdpa_math", "eager")
        for dtype in ("bf16", "fp16"):
            # What is made of products and a softmax cares little for the head dimension.
            for head_dim in (128,) if name in ("sdpa_math", "eager") else HEAD_DIMS:
                yield Question(
                    f"{name}.{dtype}.d{head_dim}",
                    f"{HERE}.attention:attention",
                    {"implementation": name, "dtype": dtype, "head_dim": head_dim},
                    ("torch", "flash_attn") if flash_attn else ("torch",),
                    gpu=not everywhere,
                    cuda=name == "sdpa_cudnn",
                )


def _products() -> Iterator[Question]:
    yield Question("grouped_mm", f"{HERE}.products:grouped_mm")
    for name, scaling, left in (
        ("tensor", "tensor", "e4m3fn"),
        ("tensor.e5m2", "tensor", "e5m2"),
        ("row", "row", "e4m3fn"),
    ):
        yield Question(f"scaled_mm.{name}", f"{HERE}.fp8:scaled_mm", {"scaling": scaling, "left": left})


def _fp8() -> Iterator[Question]:
    for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"):
        yield Question(f"fp8.{name}", f"{HERE}.fp8:cast", {"name": name})


def _triton() -> Iterator[Question]:
    imports = ("torch", "triton")
    yield Question("triton.add", f"{HERE}.compiled:add", imports=imports, gpu=True)
    for dtype in ("bf16", "fp8"):
        yield Question(f"triton.dot.{dtype}", f"{HERE}.compiled:dot", {"dtype": dtype}, imports, gpu=True)


def _bitsandbytes() -> Iterator[Question]:
    for name in ("nf4", "nf4_matmul", "adamw8bit"):
        yield Question(f"bitsandbytes.{name}", f"{HERE}.quantized:{name}", imports=("torch", "bitsandbytes"))


def _experts() -> Iterator[Question]:
    for name in ("eager", "batched_mm", "grouped_mm"):
        yield Question(f"experts.{name}", f"{HERE}.experts:experts", {"implementation": name}, TRANSFORMERS)


def _lora() -> Iterator[Question]:
    for library in ("blas", "lt"):
        for rank in RANKS:
            arguments = {"library": library, "rank": rank}
            yield Question(f"lora_{library}.r{rank}", f"{HERE}.products:lora", arguments, gpu=library == "lt")


def _soak() -> Iterator[Question]:
    """Minutes each: asked when they are named."""
    for name, minutes, share in (("quick", 0, 50), ("half", 4, 50), ("full", 4, 90)):
        arguments = {"rank": 16, "minutes": minutes, "share": share}
        yield Question(
            f"soak.lora.{name}", f"{HERE}.soak:lora", arguments, ("torch", "transformers", "peft"), long=True
        )


def _several() -> Iterator[Question]:
    yield Question("all_reduce", f"{HERE}.groups:all_reduce")
    # Copies between cards over PCIe have hung hosts with several R9700 (RS-KI-004).
    yield Question("peer_copies", f"{HERE}.groups:peer_copies", gpu=True, risky=("gfx12",))
