"""Every form in which our kernels are launched on AMD GPUs: what the audit compiles and a warm cache holds.

Configurations come from the tables that launches read: none is compiled here that does not run. Types and alignments
are those of the launches: bf16 throughout, float16 for a middle tile; adapters of the usual and the largest rank; the
128 experts of Qwen3-30B-A3B. Not here: float32, for which RDNA has no matrix instructions, and other experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from radeon_stack.kernels import configs
from radeon_stack.kernels.configs import Kind, Tile
from radeon_stack.kernels.jit import decode, grouped, linear, routing
from radeon_stack.kernels.variant import Variant

EXPERTS = {"EXPERTS": 128, "PADDED": 128}  # Qwen3-30B-A3B's
FAMILY = "hip"
RANK = 16  # of adapters an expert
DENSE_RANK = 64  # of adapters of dense layers: the recipes'
MIDDLE = 64  # the row block whose tiles stand for the others where a flag is tried
INTEGERS = ("n_size", "k_size", "top_k", "rank", "m_tiles", "rows", "a_top_k", "b_top_k", "tokens", "width", "count")
ALIGNED = ("n_size", "k_size", "width")
STORED = {  # how a weight is stored → (its NF4 constants, the types of its six pointers)
    "16 bit": ({"NF4": 0, "NESTED": False}, None),
    "nf4": ({"NF4": 1, "NESTED": False}, ("*u8", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32")),
    "nf4 double": ({"NF4": 1, "NESTED": True}, ("*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32")),
}
WEIGHT = ("w", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")


def variants(arch: str) -> tuple[Variant, ...]:
    """All of them for an AMD target ("gfx1201", …). Every target has the same: the tables know a family only."""
    del arch
    return (*_experts(), *_gradients(), *_dense(), *_routing())


def _experts() -> Iterator[Variant]:
    kinds: dict[Kind, tuple[Any, dict[str, Any]]] = {
        "gated_forward": (grouped.gated_forward, {"SAVE": True}),
        "forward": (grouped.grouped_matmul, {**_flags(scatter=True, over_columns=True), **_extras(weighted=True)}),
        "gated_backward": (grouped.gated_backward, {"SAVE": False}),
        "backward": (grouped.grouped_matmul, {**_flags(scatter=True, over_columns=False), **_extras()}),
    }
    for kind, (kernel, constants) in kinds.items():
        for stored in ("16 bit", "nf4"):
            tiles = configs.TILES[FAMILY, stored != "16 bit", kind]
            for rows, tile in tiles.items():
                name = f"experts {kind} {stored} rows {rows}"
                yield _grouped(name, kernel, stored, tile, {**constants, "RANK": 0})
            middle = tiles[MIDDLE]
            rank = {"RANK": RANK, **({"SAVE": True} if "SAVE" in constants else {})}
            yield _grouped(f"experts {kind} {stored} rank {RANK}", kernel, stored, middle, {**constants, **rank})
            largest = {**rank, "RANK": configs.MAX_RANK}
            yield _grouped(
                f"experts {kind} {stored} rank {configs.MAX_RANK}", kernel, stored, middle, {**constants, **largest}
            )
            yield _grouped(f"experts {kind} {stored} fp16", kernel, stored, middle, {**constants, "RANK": 0}, "*fp16")
        middle = configs.TILES[FAMILY, True, kind][MIDDLE]
        yield _grouped(f"experts {kind} nf4 double", kernel, "nf4 double", middle, {**constants, "RANK": 0})
    for over in (True, False):
        kind = "forward" if over else "backward"
        flags = {**_flags(gather=True, over_columns=over), **_extras(bias=over), "RANK": 0}
        tile = configs.TILES[FAMILY, False, kind][MIDDLE]
        yield _grouped(f"experts {kind} gathered, bias", grouped.grouped_matmul, "16 bit", tile, flags)


def _gradients() -> Iterator[Variant]:
    for n, k in ((64, 64), (16, 64), (64, 16)):
        constants = {"A_GATHER": True, "B_GATHER": False, "BLOCK_M": 32, "BLOCK_N": n, "BLOCK_K": k}
        types = {"scale": "fp32", "slots": "*i32", "offsets": "*i32"}
        yield _variant(f"experts gradient {n}x{k}", grouped.grouped_outer, constants, types, stages=2)
    constants = {"RANK": DENSE_RANK, "BLOCK_M": 64, "BLOCK_C": 64}
    types = {"d_a": "*fp32", "d_b": "*fp32", "scale": "fp32"}
    yield _variant("dense adapter gradients", linear.adapter_gradients, constants, types, stages=configs.ADAPTER_STAGES)


def _dense() -> Iterator[Variant]:
    for over in (True, False):
        way = "forward" if over else "backward"
        common = {"OVER_COLUMNS": over, "BIAS": False, "RANK": DENSE_RANK, "SPLIT": configs.low_rank_split(64)}
        for rows, tile in configs.LINEAR[FAMILY].items():
            yield _linear(f"dense {way} nf4 rows {rows}", "nf4", tile, common)
        largest = {**common, "RANK": configs.MAX_RANK}
        yield _linear(f"dense {way} nf4 rank {configs.MAX_RANK}", "nf4", configs.LINEAR[FAMILY][MIDDLE], largest)
        yield _linear(f"dense {way} nf4 double", "nf4 double", configs.LINEAR[FAMILY][MIDDLE], common)
        constants = {"OVER_COLUMNS": over, "RANK": DENSE_RANK, "SPLIT": configs.low_rank_split(64)}
        constants |= {"BLOCK_M": 64, "BLOCK_K": 64}
        types = {"factor": "*fp32", "partials": "*fp32"}
        yield _variant(
            f"dense {way} low rank", linear.low_rank_partials, constants, types,
            warps=configs.LOW_RANK_WARPS, stages=configs.ADAPTER_STAGES,
        )  # fmt: skip
    for stored in ("nf4", "nf4 double"):
        nf4, pointers = STORED[stored]
        types = {"packed": "*u8", **_pointers(pointers), "size": "i32"}
        constants = {**nf4, "BLOCK": 4096}
        yield _variant(
            f"decode {stored}", decode.decode_blocks, constants, types, dot=False, fp_fusion=False, aligned=("size",)
        )


def _routing() -> Iterator[Variant]:
    sizes = {"PADDED": 128, "BLOCK": 512, "CHUNK": 32}
    types = {"expert_of": "*i64", "counts": "*i32", "slots": "*i32", "offsets": "*i32", "size": "i32", "blocks": "i32"}
    yield _variant("count experts", routing.count_experts, sizes, types, warps=8, dot=False)
    constants = {"EXPERTS": 128, **sizes, "BLOCKS": 32}
    yield _variant("place slots", routing.place_slots, constants, types, warps=8, dot=False)
    for parts in (0, 16):
        constants = {"TOP_K": 8, "PARTS": parts, "BLOCK_T": 4, "BLOCK_H": 512}
        types = {"parts": "*fp32" if parts else "*bf16"}
        yield _variant(f"combine parts {parts}", routing.combine, constants, types, dot=False)
    router = {**EXPERTS, "TOP_K": 8}
    for tokens in (4, 8):
        after = {"NORMALISE": True, "BLOCK_T": tokens}
        constants = {**router, "TOP_PADDED": 8, **after}
        yield _variant(f"router {tokens}", routing.router_forward, constants, {"index": "*i64"}, dot=False)
        constants = {**router, **after}
        yield _variant(f"router back {tokens}", routing.router_backward, constants, {"index": "*i64"}, dot=False)


def _grouped(
    name: str, kernel: Any, stored: str, tile: Tile, constants: Mapping[str, Any], dtype: str = "*bf16"
) -> Variant:
    nf4, pointers = STORED[stored]
    types = {"slots": "*i32", "offsets": "*i32", "d_weight": "*fp32", "lora_scale": "fp32", **_pointers(pointers)}
    return _variant(
        name,
        kernel,
        {**EXPERTS, **constants, **nf4, **_blocks(tile)},
        types,
        dtype=dtype,
        warps=tile.warps,
        stages=tile.stages,
        fp_fusion=stored == "16 bit",
    )


def _linear(name: str, stored: str, tile: Tile, constants: Mapping[str, Any]) -> Variant:
    nf4, pointers = STORED[stored]
    types = {"partials": "*fp32", "factor": "*fp32", "scale": "fp32", **_pointers(pointers)}
    return _variant(
        name,
        linear.linear,
        {**constants, **nf4, **_blocks(tile)},
        types,
        warps=tile.warps,
        stages=tile.stages,
        fp_fusion=stored == "16 bit",
    )


def _variant(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    *,
    dtype: str = "*bf16",
    warps: int = 4,
    stages: int = 1,
    dot: bool = True,
    fp_fusion: bool = True,
    aligned: tuple[str, ...] = (),
) -> Variant:
    signature = {}
    for parameter in kernel.arg_names:
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in types:
            signature[parameter] = types[parameter]
        else:
            signature[parameter] = "i32" if parameter in INTEGERS else dtype
    pointers = tuple(parameter for parameter, kind in signature.items() if kind.startswith("*"))
    integers = tuple(parameter for parameter in ALIGNED if parameter in signature)
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={parameter: constants[parameter] for parameter in kernel.arg_names if parameter in constants},
        num_warps=warps,
        num_stages=stages,
        dot=dot,
        default=True,
        fp_fusion=fp_fusion,
        aligned=(*pointers, *integers, *aligned),
    )


def _flags(*, over_columns: bool, gather: bool = False, scatter: bool = False) -> dict[str, Any]:
    return {"GATHER": gather, "SCATTER": scatter, "OVER_COLUMNS": over_columns}


def _extras(*, bias: bool = False, weighted: bool = False) -> dict[str, Any]:
    return {"BIAS": bias, "WEIGHTED": weighted}


def _blocks(tile: Tile) -> dict[str, Any]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group, "AHEAD": tile.ahead}


def _pointers(types: tuple[str, ...] | None) -> dict[str, str]:
    return dict(zip(WEIGHT, types, strict=True)) if types else {}
