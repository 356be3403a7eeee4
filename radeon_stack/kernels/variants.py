"""The forms in which our kernels are launched on AMD GPUs: what the audit compiles and an image ships compiled.

Configurations come from the tables that launches read: none is compiled here that does not run. Types and alignments
are those of the launches: bf16, adapters in float32 as PEFT keeps them, the 128 experts of Qwen3-30B-A3B. That nothing
is missing which the recipes launch is tested by launching it. Of what they do not launch, samples: float16 for a middle
tile, the largest rank. Not here: float32, for which RDNA has no matrix instructions, and other experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from radeon_stack.kernels import configs
from radeon_stack.kernels.configs import FP8_DECODE_BLOCK, NF4_DECODE_BLOCK, Kind, Tile
from radeon_stack.kernels.jit import decode, fp8, grouped, linear, router, routing
from radeon_stack.kernels.jit.head import score_rows
from radeon_stack.kernels.variant import Variant

EXPERTS = {"EXPERTS": 128, "PADDED": 128}  # Qwen3-30B-A3B's
FAMILY = "hip"
RANK = 16  # of adapters an expert, padded: the recipes' 8
DENSE_RANK = 64  # of adapters of dense layers: the recipes'
FEW = 16  # the row block of a few tokens: of generated ones, and of short texts among many experts
MIDDLE = 64  # the row block whose tiles stand for the others where a flag is tried
LOW_RANK_ROWS = (16, 32, 64)  # row blocks of the adapters' own small products
INTEGERS = ("n_size", "k_size", "top_k", "rank", "m_tiles", "rows", "a_top_k", "b_top_k", "tokens", "width", "count")
ALIGNED = ("n_size", "k_size", "width")
STORED = {  # how a weight is stored → (its NF4 constants, the types of its six pointers)
    "16 bit": ({"NF4": 0, "NESTED": False}, None),
    "float32": ({"NF4": 0, "NESTED": False}, ("*fp32",) * 6),
    "nf4": ({"NF4": 1, "NESTED": False}, ("*u8", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32")),
    "nf4 double": ({"NF4": 1, "NESTED": True}, ("*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32")),
}
WEIGHT = ("w", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")


def variants(arch: str) -> tuple[Variant, ...]:
    """All of them for an AMD target ("gfx1201", …). Every target has the same: the tables know a family only."""
    del arch
    return (*_experts(), *_gradients(), *_dense(), *_fp8(), *_routing(), *_head())


def packed_product(kind: Kind, tile: Tile) -> Variant:
    """A product of NF4 experts with another tile than an AMD GPU's."""
    kernel, constants = _kinds()[kind]
    return _grouped(f"experts {kind} nf4", kernel, "nf4", tile, {**constants, "RANK": 0})


def _kinds() -> dict[Kind, tuple[Any, dict[str, Any]]]:
    """Of experts' products the kernel, and its constants besides a tile's."""
    return {
        "gated_forward": (grouped.gated_forward, {"SAVE": True}),
        "forward": (grouped.grouped_matmul, {**_flags(scatter=True, over_columns=True), **_extras(weighted=True)}),
        "gated_backward": (grouped.gated_backward, {"SAVE": False}),
        "backward": (grouped.grouped_matmul, {**_flags(scatter=True, over_columns=False), **_extras()}),
    }


def _experts() -> Iterator[Variant]:
    for kind, (kernel, constants) in _kinds().items():
        for stored in ("16 bit", "nf4"):
            tiles = configs.TILES[FAMILY, stored != "16 bit", kind]
            for rows, tile in tiles.items():
                name = f"experts {kind} {stored} rows {rows}"
                yield _grouped(name, kernel, stored, tile, {**constants, "RANK": 0})
            if kind == "gated_forward":  # nothing is kept where nothing is trained: of generated tokens
                for number in (0, RANK):
                    name = f"experts {kind} {stored} rows {FEW} rank {number}, not trained"
                    yield _grouped(name, kernel, stored, tiles[FEW], {**constants, "RANK": number, "SAVE": False})
            middle = tiles[MIDDLE]
            rank = {"RANK": RANK, **({"SAVE": True} if "SAVE" in constants else {})}
            for rows in (FEW, MIDDLE):
                name = f"experts {kind} {stored} rows {rows} rank {RANK}"
                yield _grouped(name, kernel, stored, tiles[rows], {**constants, **rank})
            largest = {**constants, **rank, "RANK": configs.MAX_RANK}
            name = f"experts {kind} {stored} rank {configs.MAX_RANK}"
            yield replace(_grouped(name, kernel, stored, middle, largest), default=False)  # no recipe's
            yield _grouped(f"experts {kind} {stored} fp16", kernel, stored, middle, {**constants, "RANK": 0}, "*fp16")
        middle = configs.TILES[FAMILY, True, kind][MIDDLE]
        yield _grouped(f"experts {kind} nf4 double", kernel, "nf4 double", middle, {**constants, "RANK": 0})
    for over in (True, False):
        for gather in (True, False):  # of adapters: x·aᵀ by token, then sorted; and the same back
            kind = "forward" if over else "backward"
            flags = {**_flags(gather=gather, over_columns=over), **_extras(), "RANK": 0}
            for rows in (FEW, MIDDLE):
                tile = configs.TILES[FAMILY, False, kind][rows]
                name = f"experts' adapters {kind}{' gathered' if gather else ''} rows {rows}"
                yield _grouped(name, grouped.grouped_matmul, "float32", tile, flags, unaligned=("n_size",))
    for over in (True, False):
        kind = "forward" if over else "backward"
        flags = {**_flags(gather=True, over_columns=over), **_extras(bias=over), "RANK": 0}
        tile = configs.TILES[FAMILY, False, kind][MIDDLE]
        yield _grouped(f"experts {kind} gathered, bias", grouped.grouped_matmul, "16 bit", tile, flags)


def _gradients() -> Iterator[Variant]:
    types = {"scale": "fp32", "slots": "*i32", "offsets": "*i32"}
    for gathered in ("A", "B"):
        constants = {**_outer(64, 64), f"{gathered}_GATHER": True}
        yield _variant(f"experts gradient, {gathered} gathered", grouped.grouped_outer, constants, types, stages=2)
    for factor, (gathered, n, k) in {
        "a of gate and up": ("B", 16, 64),
        "b of gate and up": ("", 64, 16),
        "a of down": ("", 16, 64),
        "b of down": ("A", 64, 16),
    }.items():
        constants = {**_outer(n, k), **({f"{gathered}_GATHER": True} if gathered else {})}
        yield _variant(
            f"experts' adapters gradient of {factor}", grouped.grouped_outer, constants, {**types, "out": "*fp32"},
            stages=2, unaligned=("n_size" if n < k else "k_size",),
        )  # fmt: skip
    types = {"d_a": "*fp32", "d_b": "*fp32", "scale": "fp32"}
    for rows in LOW_RANK_ROWS:
        constants = {"RANK": DENSE_RANK, "BLOCK_M": rows, "BLOCK_C": 64}
        yield _variant(
            f"dense adapter gradients rows {rows}", linear.adapter_gradients, constants, types,
            stages=configs.ADAPTER_STAGES,
        )  # fmt: skip


def _dense() -> Iterator[Variant]:
    few, many, most = map(configs.low_rank_split, (1, configs.DECODE_ONCE_ROWS[FAMILY], configs.ADAPTER_BY_TORCH_ROWS))
    for over in (True, False):
        way = "forward" if over else "backward"
        common = {"OVER_COLUMNS": over, "BIAS": False, "RANK": DENSE_RANK, "SPLIT": few}
        tiles = configs.LINEAR[FAMILY]
        for stored in ("nf4", "nf4 double"):
            for rows, tile in tiles.items():
                yield _linear(f"dense {way} {stored} rows {rows}", stored, tile, common)
            yield _linear(f"dense {way} {stored} split {many}", stored, tiles[max(tiles)], {**common, "SPLIT": many})
        largest = {**common, "RANK": configs.MAX_RANK}
        yield _linear(f"dense {way} nf4 rank {configs.MAX_RANK}", "nf4", tiles[MIDDLE], largest)
        types = {"factor": "*fp32", "partials": "*fp32"}
        last = max(LOW_RANK_ROWS)
        # At most rows only where a forward's product is known and x·aᵀ is not.
        splits = *((rows, few) for rows in LOW_RANK_ROWS), (last, many), *([(last, most)] if over else [])
        for rows, split in splits:
            constants = {"OVER_COLUMNS": over, "RANK": DENSE_RANK, "SPLIT": split, "BLOCK_M": rows, "BLOCK_K": 64}
            yield _variant(
                f"dense {way} low rank rows {rows} split {split}", linear.low_rank_partials, constants, types,
                warps=configs.LOW_RANK_WARPS, stages=configs.ADAPTER_STAGES,
            )  # fmt: skip
        for rank in (DENSE_RANK, configs.MAX_RANK):
            yield from _decoded(f"dense {way} decoded rank {rank}", over, rank, most)
    for stored in ("nf4", "nf4 double"):
        nf4, pointers = STORED[stored]
        types = {"packed": "*u8", **_pointers(pointers), "size": "i32"}
        constants = {**nf4, "BLOCK": NF4_DECODE_BLOCK}
        yield _variant(
            f"decode {stored}", decode.decode_blocks, constants, types, dot=False, fp_fusion=False, aligned=("size",)
        )


def _decoded(name: str, over: bool, rank: int, split: int) -> Iterator[Variant]:
    """All that is ours where torch multiplies a matrix that was decoded."""
    common = {"OVER_COLUMNS": over, "RANK": rank, "SPLIT": split}
    for stored in ("nf4", "nf4 double"):
        nf4, pointers = STORED[stored]
        types = {"partials": "*fp32", "factor": "*fp32", "packed": "*u8", **_pointers(pointers), "size": "i32"}
        blocks = {"BLOCK_M": max(LOW_RANK_ROWS), "BLOCK_K": configs.low_rank_step(rank), "BLOCK": NF4_DECODE_BLOCK}
        constants = {**common, **nf4, **blocks}
        yield _variant(
            f"{name} {stored}", linear.decode_and_low_rank, constants, types, warps=configs.LOW_RANK_WARPS,
            stages=configs.ADAPTER_STAGES, fp_fusion=False, aligned=("size",),
        )  # fmt: skip
    (m, n), types = configs.LOW_RANK_TILE, {"factor": "*fp32", "scale": "fp32"}
    constants = {**common, "BIAS": False, "BLOCK_M": m, "BLOCK_N": n}
    # Forward u may be known from before, back there may be a gradient to add to.
    for told, change in (("", {}), (" u known", {"SPLIT": 0}) if over else (" onto", {"ONTO": True})):
        yield _variant(
            f"{name} product{told}", linear.low_rank_product, {"ONTO": False, **constants, **change},
            {**types, "partials": "*bf16" if change.get("SPLIT") == 0 else "*fp32"}, warps=configs.LOW_RANK_WARPS,
        )  # fmt: skip


def _fp8() -> Iterator[Variant]:
    types = {"w": "*u8", "scales": "*fp32"}
    for blocks, stored in ((0, "channel"), (1, "block")):
        for over in (True, False):
            way = "forward" if over else "backward"
            constants = {"OVER_COLUMNS": over, "BLOCKS": blocks, "BIAS": False}
            tiles = configs.FP8[FAMILY, not over and not blocks]
            for rows, tile in tiles.items():
                yield _fp8_linear(f"fp8 {way} {stored} rows {rows}", tile, constants, types)
            middle = tiles[MIDDLE]
            yield _fp8_linear(f"fp8 {way} {stored} fp16", middle, constants, types, "*fp16")
            if over:
                yield _fp8_linear(f"fp8 {way} {stored} bias", middle, {**constants, "BIAS": True}, types)
        constants = {"BLOCKS": blocks, "BLOCK_C": FP8_DECODE_BLOCK}
        yield _variant(
            f"fp8 decode {stored}", fp8.fp8_decode, constants, {**types, "columns": "i32"}, dot=False,
            aligned=("columns",),
        )  # fmt: skip


def _routing() -> Iterator[Variant]:
    types = {"expert_of": "*i64", "counts": "*i32", "slots": "*i32", "offsets": "*i32"}
    types |= dict.fromkeys(("size", "blocks", "experts"), "i32")
    for slots, (chunk, warps) in configs.FEW_SLOTS[FAMILY].items():
        yield _variant(f"sort {slots} slots", routing.sort_few_slots, {"CHUNK": chunk}, types, warps=warps, dot=False)
    sizes = {"PADDED": 128, "BLOCK": 512, "CHUNK": 32}
    yield _variant("count experts", routing.count_experts, sizes, types, warps=8, dot=False)
    constants = {"EXPERTS": 128, **sizes, "BLOCKS": 32}
    yield _variant("place slots", routing.place_slots, constants, types, warps=8, dot=False)
    for parts in (0, 16):
        constants = {"TOP_K": 8, "PARTS": parts, "BLOCK_T": 4, "BLOCK_H": 512}
        types = {"parts": "*fp32" if parts else "*bf16"}
        yield _variant(f"combine parts {parts}", routing.combine, constants, types, dot=False)
    sizes, index = {**EXPERTS, "TOP_K": 8}, {"index": "*i64"}
    for tokens in (4, 8):
        after = {"NORMALISE": True, "BLOCK_T": tokens}
        constants = {**sizes, "TOP_PADDED": 8, **after}
        yield _variant(f"router {tokens}", router.router_forward, constants, index, dot=False)
        yield _variant(f"router back {tokens}", router.router_backward, {**sizes, **after}, index, dot=False)
    for tokens, tile in configs.GATE[FAMILY].items():
        constants = {**sizes, "TOP_PADDED": 16, "NORMALISE": True, "BLOCK_T": tile.m, "BLOCK_K": tile.k}
        name = f"gate {tokens} tokens"
        yield _variant(name, router.gate_forward, constants, index, warps=tile.warps, stages=tile.stages)
    for tokens, tile in configs.GATE_BACK[FAMILY].items():
        constants = {**sizes, "NORMALISE": True, "SAVE": False, "BLOCK_T": tile.m, "BLOCK_N": tile.n}
        name, types = f"gate back {tokens} tokens", {**index, "columns": "i32"}
        yield _variant(name, router.gate_backward, constants, types, warps=tile.warps, stages=tile.stages)


def _head() -> Iterator[Variant]:
    types = {"targets": "*i64", "log_probs": "*fp32", "entropy": "*fp32", "is_top1": "*i8", "scale": "fp32"}
    for gradient, dtype in ((True, "*bf16"), (False, "*bf16"), (True, "*fp16")):
        name = f"head scores{'' if gradient else ', not trained'}{' fp16' if dtype == '*fp16' else ''}"
        constants = {"GRADIENT": gradient, "BLOCK": configs.HEAD_BLOCK}
        yield _variant(name, score_rows, constants, types, dtype=dtype, warps=configs.HEAD_WARPS, dot=False)


def _grouped(
    name: str,
    kernel: Any,
    stored: str,
    tile: Tile,
    constants: Mapping[str, Any],
    dtype: str = "*bf16",
    unaligned: tuple[str, ...] = (),
) -> Variant:
    nf4, pointers = STORED[stored]
    types = {"slots": "*i32", "offsets": "*i32", "d_weight": "*fp32", "lora_scale": "fp32", **_pointers(pointers)}
    types |= {"v": "*fp32"} if constants["RANK"] else {}
    return _variant(
        name,
        kernel,
        {**EXPERTS, **constants, **nf4, **_blocks(tile)},
        types,
        dtype=dtype,
        warps=tile.warps,
        stages=tile.stages,
        fp_fusion=not nf4["NF4"],
        unaligned=unaligned,
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


def _fp8_linear(
    name: str, tile: Tile, constants: Mapping[str, Any], types: Mapping[str, str], dtype: str = "*bf16"
) -> Variant:
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group}
    every = {**constants, **blocks}
    return _variant(name, fp8.fp8_linear, every, types, dtype=dtype, warps=tile.warps, stages=tile.stages)


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
    unaligned: tuple[str, ...] = (),
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
    integers = tuple(parameter for parameter in ALIGNED if parameter in signature and parameter not in unaligned)
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


def _outer(n: int, k: int) -> dict[str, Any]:
    return {"A_GATHER": False, "B_GATHER": False, "BLOCK_M": 32, "BLOCK_N": n, "BLOCK_K": k}


def _flags(*, over_columns: bool, gather: bool = False, scatter: bool = False) -> dict[str, Any]:
    return {"GATHER": gather, "SCATTER": scatter, "OVER_COLUMNS": over_columns}


def _extras(*, bias: bool = False, weighted: bool = False) -> dict[str, Any]:
    return {"BIAS": bias, "WEIGHTED": weighted}


def _blocks(tile: Tile) -> dict[str, Any]:
    sizes = {"BLOCK_M": tile.m, "TAIL": tile.tail, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group}
    return {**sizes, "TURNED": 0, "PAIRS": False}


def _pointers(types: tuple[str, ...] | None) -> dict[str, str]:
    return dict(zip(WEIGHT, types, strict=True)) if types else {}
