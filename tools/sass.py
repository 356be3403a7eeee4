"""What NVIDIA's disassembler prints, as far as products that read registers need it."""

from __future__ import annotations

import re
from collections.abc import Iterator

OFTEN = 3  # times round a loop until what is in flight repeats
A_REGISTERS = 4  # of a product's left operand: 16 bit, [64, 16] by four warps
# What writes no register of a thread's own.
STORES = ("ST", "RED", "BAR", "BRA", "EXIT", "LDGSTS", "LDGDEPBAR", "DEPBAR", "WARPSYNC", "WARPGROUP", "HGMMA")


def written_while_read(sass: str) -> list[str]:
    """Instructions of loops that write a register which a product in flight still reads, each with that product.

    A product (HGMMA) reads its left operand from registers while its thread goes on, until a WARPGROUP.DEPBAR that
    leaves fewer groups of products running than have begun since.
    """
    instructions, labels = _read(sass)
    found: dict[str, None] = {}
    for first, last in _loops(instructions, labels):
        flying: list[list[tuple[str, range]]] = [[]]  # the last is the group that is being made
        for instruction in instructions[first : last + 1] * OFTEN:
            operation, operands = _parts(instruction)
            if operation.startswith("HGMMA"):
                left = _register(operands[1])
                if left is not None:
                    flying[-1].append((instruction, range(left, left + A_REGISTERS)))
                if "gsb0" in operands:
                    flying.append([])
            elif operation == "WARPGROUP.DEPBAR.LE":
                running = int(operands[1], 16)
                flying = flying[-running - 1 :]
            else:
                written = _written(operation, operands)
                for product, registers in (one for group in flying for one in group):
                    if any(register in registers for register in written):
                        found[f"{instruction} | {product}"] = None
    return list(found)


def products_of_registers(sass: str) -> int:
    """Instructions that are products and read their left operand from registers."""
    parts = [_parts(instruction) for instruction in _read(sass)[0]]
    return sum(operation.startswith("HGMMA") and _register(operands[1]) is not None for operation, operands in parts)


def _read(sass: str) -> tuple[list[str], dict[str, int]]:
    """(instructions, label → the place of the one after it)"""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels


def _loops(instructions: list[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last instruction of what is jumped back over and has products."""
    for place, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        first = labels.get(target[1], place + 1) if target else place + 1
        if any("HGMMA" in one for one in instructions[first : place + 1]):
            yield first, place


def _parts(instruction: str) -> tuple[str, list[str]]:
    words = re.sub(r"^@!?U?P\w+\s+", "", instruction).split(None, 1)
    return words[0], [part.strip() for part in words[1].split(",")] if len(words) > 1 else []


def _written(operation: str, operands: list[str]) -> range:
    """The registers that an operation writes."""
    if operation.startswith(STORES):
        return range(0)
    # Predicates that it writes too come first.
    target = next((operand for operand in operands if not re.fullmatch(r"U?P\w", operand)), "")
    register = _register(target)
    if register is None:
        return range(0)
    wide = re.search(r"\.(64|128)\b|\.(WIDE)\b", operation)
    count = {"64": 2, "128": 4, "WIDE": 2}[wide[1] or wide[2]] if wide else 1
    if operation.startswith("LDSM"):
        count = int(operation[-1]) if operation[-1] in "24" else 1
    if operation == "CS2R":
        count = 2
    return range(register, register + count)


def _register(operand: str) -> int | None:
    found = re.match(r"R(\d+)\b", operand)
    return int(found[1]) if found else None
