"""Do 4-bit layers, the 8-bit optimizer and attention compute what they should? Seeds are fixed."""

from __future__ import annotations

from radeon_stack.errors import CheckError

# Mean absolute error of NF4 on a standard normal, in units of its sigma: 0.07 to 0.1 by the spacing of its 16 levels
# (QLoRA, arXiv 2305.14314, appendix E). Broken warp-32 kernels: off by 0.73 (bitsandbytes PR 1885).
NF4_MEAN_ERROR = (0.05, 0.12)
BLOCK_SIZES = (64, 128)
ADAM_STEPS = 5
ADAM_ERROR = 0.1  # mean, relative: block-wise 8-bit states (arXiv 2110.02861); measured 0.02 on a CPU


def nf4_round_trip(device: str) -> str:
    """Mean error of packing and unpacking random bf16 values at each block size."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    values = torch.randn(512, 512, dtype=torch.bfloat16, device=device)
    told = []
    for block in BLOCK_SIZES:
        packed, state = quantize_4bit(values, blocksize=block, quant_type="nf4")
        error = (dequantize_4bit(packed, state).float() - values.float()).abs().mean().item()
        low, high = NF4_MEAN_ERROR
        if not low < error < high:
            raise CheckError(f"NF4 at block size {block} is off by {error:.3g} sigma; {low} to {high} is right")
        told.append(f"{error:.4f} at {block}")
    return "mean error in sigma: " + ", ".join(told)


def nf4_gradient(device: str) -> str:
    """Largest difference between an NF4 layer's input gradient and that of its decoded weight, relative to it."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    x = torch.randn(8, 128, requires_grad=True, device=device)
    layer(x).square().sum().backward()
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = 2 * (x.detach() @ weight.T) @ weight
    if x.grad is None:
        raise CheckError("an NF4 layer gives no gradient")
    error = ((x.grad - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-4:
        raise CheckError(f"an NF4 layer's gradient is off by {error:.2g}")
    return f"relative error {error:.2g}"


def adamw8bit_steps(device: str) -> str:
    """A few steps of AdamW8bit against torch's AdamW: one alone does not read the 8-bit states back."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    start = torch.randn(256, 256, device=device)
    gradients = [torch.randn_like(start) for _ in range(ADAM_STEPS)]
    moved = []
    for make in (AdamW8bit, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=1e-2, weight_decay=0.0)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        if make is AdamW8bit and torch.uint8 not in {
            getattr(v, "dtype", None) for v in optimizer.state[weight].values()
        }:
            raise CheckError("AdamW8bit keeps no 8-bit state")
        moved.append(weight.detach() - start)
    error = ((moved[0] - moved[1]).abs().mean() / moved[1].abs().mean()).item()
    if not error < ADAM_ERROR:
        raise CheckError(f"{ADAM_STEPS} steps of AdamW8bit are off by {error:.2g}")
    return f"{ADAM_STEPS} steps, relative error {error:.2g}"


def nf4_gemv() -> str:
    """The one-row product, which decoding uses, against the decoded weight."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(1024, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    x = torch.randn(1, 1024, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        found = layer(x).float()
        expected = x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < 0.02:  # NaN fails too
        raise CheckError(f"a one-row NF4 product is off by {error:.2g}")
    return f"relative error {error:.2g}"


def flash_attention() -> str:
    """SDPA held to its flash kernel, against float32 on its plain form."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 256, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    attention = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        found = attention(*inputs, is_causal=True)
        found.sum().backward()
    with sdpa_kernel([SDPBackend.MATH]):
        expected = attention(*exact, is_causal=True)
        expected.sum().backward()
    error = (found.float() - expected).abs().max().item()
    backward = max(((a.grad.float() - b.grad).abs().max()).item() for a, b in zip(inputs, exact, strict=True))
    if not (error < 0.05 and backward < 0.2):
        raise CheckError(f"flash attention is off by {error:.2g} forward, {backward:.2g} backward")
    return f"off by {error:.2g} forward, {backward:.2g} backward"


def gpu_is(gfx: str) -> str:
    """The first GPU's name is the image's gfx."""
    import torch

    if not torch.cuda.is_available():
        raise CheckError("no GPU is visible to torch")
    found = str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    if found != gfx:
        raise CheckError(f"the GPU is {found}, the image is for {gfx}")
    return f"{found}, {torch.cuda.get_device_name(0)}"
