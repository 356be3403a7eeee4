"""`python -m radeon_stack.workloads.probe --torch 2.13.0`: the versions as JSON, or a reason and exit code 7."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

from radeon_stack.errors import CheckError, Exit

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "safetensors")


def probe(expected_torch: str) -> dict[str, Any]:
    """Import everything and train an NF4 layer's input. CheckError says what does not hold."""
    for name in PACKAGES:
        import_module(name)
    found = version("torch")
    if found.partition("+")[0] != expected_torch:
        raise CheckError(f"torch is {found}, the base's is {expected_torch}: something replaced it")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "nf4_gradient_error": nf4_gradient_error(),
    }


def nf4_gradient_error() -> float:
    """Largest difference between an NF4 layer's input gradient and that of its decoded weight, relative to it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(8, 128, requires_grad=True)
    layer(x).square().sum().backward()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = 2 * (x.detach() @ weight.T) @ weight
    if x.grad is None:
        raise CheckError("an NF4 layer gives no gradient")
    error = ((x.grad - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-4:
        raise CheckError(f"an NF4 layer's gradient is off by {error:.2g}")
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="the version the base brought")
    try:
        print(json.dumps(probe(parser.parse_args().torch), indent=2))
    except (CheckError, ImportError) as error:
        print(f"probe: {error}", file=sys.stderr)
        return Exit.CHECK
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
