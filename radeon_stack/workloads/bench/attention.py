"""The attention suite: every implementation there is, forward and backward, against float64.

Inputs are laid out as projections leave them, [batch, seq, heads, head_dim]; where documents of uneven length follow
each other (`varlen`) they are packed, [tokens, heads, head_dim]. Who wants another layout gets a transposed view, as in
a model.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from radeon_stack.figures import Case
from radeon_stack.workloads.bench.suite import Built, Missing, Work
from radeon_stack.workloads.bench.timing import Call

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# In float64, forward and backward: what a card with slow float64 does in a second or two. Beyond, a part is compared.
TRUTH_OPERATIONS = 1e12
TRUTH_ROWS = 2048  # of the score matrix at a time
# Units in the last place of the dtype. Right implementations were seen at one or less; a wrong scale is far above.
LIMIT_ULPS = 4
NO_KERNEL = ("No available kernel", "No viable backend")
BACKWARD_TO_FORWARD = 2.5  # matrix products: the backward pass has five of the forward's size, which has two


@dataclass(frozen=True)
class Setting:
    """Inputs of a case. `offsets` [documents + 1] are where documents begin and end among the tokens."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def causal(self) -> bool:
        return bool(self.case["causal"])

    @property
    def varlen(self) -> bool:
        return bool(self.case["varlen"])

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return int(self.case["heads"]) // int(self.case["kv_heads"])

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(int(self.case["head_dim"]))

    @property
    def documents(self) -> list[tuple[int, int]]:
        return list(pairwise(self.offsets))

    def pairs(self) -> list[tuple[int, int, int]]:
        """(begin, end, kv head) of each product that depends on no other, thinned to what float64 can do in time."""
        every = [(a, b, head) for a, b in self.documents for head in range(int(self.case["kv_heads"]))]
        cost = sum(truth_operations(b - a, int(self.case["head_dim"]), self.group) for a, b, _ in every)
        count = max(1, min(len(every), int(len(every) * TRUTH_OPERATIONS / cost)))
        # Evenly, the last among them: what is wrong at the end of a tensor is wrong in its index arithmetic.
        return [every[-1 - (i * len(every)) // count] for i in range(count)]


Forward = Callable[[], torch.Tensor]
Implementation = Callable[[Setting], tuple[Forward, str]]


@dataclass(frozen=True)
class Attention:
    """The suite's object."""

    name: str = "attention"
    address: str = f"{__name__}:SUITE"

    @property
    def implementations(self) -> Sequence[str]:
        return tuple(IMPLEMENTATIONS)

    @property
    def results(self) -> Mapping[str, str]:
        return {"out": "forward", "dq": "backward", "dk": "backward", "dv": "backward"}

    def cases(self, config: Any) -> list[Case]:
        return [{**one, "dtype": DTYPES[one["dtype"]]} for one in config.attention.combinations()]

    def dtype(self, case: Case) -> str:
        return str(case["dtype"])

    def work(self, case: Case) -> Mapping[str, Work]:
        """Two products of L² × d a head and document forward, five backward; half of each when causal."""
        heads, kv_heads, dim = (int(case[name]) for name in ("heads", "kv_heads", "head_dim"))
        offsets = offsets_of(case)
        squares = sum((b - a) ** 2 for a, b in pairwise(offsets)) / (2 if case["causal"] else 1)
        forward = 4.0 * squares * dim * heads
        size = getattr(torch, self.dtype(case)).itemsize
        query, keys = offsets[-1] * heads * dim * size, offsets[-1] * kv_heads * dim * size
        statistics = offsets[-1] * heads * 4  # one float32 a row, kept for the backward pass
        return {
            "forward": Work(2 * query + 2 * keys + statistics, forward, self.dtype(case)),
            "backward": Work(4 * query + 4 * keys + statistics, BACKWARD_TO_FORWARD * forward, self.dtype(case)),
        }

    def setting(self, case: Case, device: torch.device, seed: int) -> Setting:
        generator = torch.Generator(device).manual_seed(seed)
        heads, kv_heads, dim = (int(case[name]) for name in ("heads", "kv_heads", "head_dim"))
        tokens = (int(case["batch"]), int(case["seq"]))
        lead = (math.prod(tokens),) if case["varlen"] else tokens

        def draw(heads: int, *, leaf: bool) -> torch.Tensor:
            values = torch.randn(*lead, heads, dim, device=device, generator=generator)
            return values.to(getattr(torch, self.dtype(case))).requires_grad_(leaf)

        q, k, v = draw(heads, leaf=True), draw(kv_heads, leaf=True), draw(kv_heads, leaf=True)
        return Setting(case, q, k, v, draw(heads, leaf=False), offsets_of(case))

    def build(self, name: str, setting: Setting) -> Built:
        forward, note = IMPLEMENTATIONS[name](setting)
        inputs = (setting.q, setting.k, setting.v)

        def backward(out: torch.Tensor) -> Any:
            return torch.autograd.grad(out, inputs, setting.grad)

        def results() -> dict[str, torch.Tensor]:
            out = forward()
            dq, dk, dv = backward(out)
            return {"out": out, "dq": dq, "dk": dk, "dv": dv}

        return Built(results, {"forward": Call(forward), "backward": Call(backward, prepare=forward)}, note)

    def truth(self, setting: Setting) -> tuple[Mapping[str, torch.Tensor], str]:
        pairs = setting.pairs()
        found = [truth_of(setting, *pair) for pair in pairs]
        total = len(setting.documents) * int(setting.case["kv_heads"])
        part = "" if len(pairs) == total else f"{len(pairs)} of {total} documents × kv heads"
        return {name: torch.cat([one[name].flatten() for one in found]) for name in self.results}, part

    def part(self, setting: Setting, results: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        found = {}
        for name, tensor in results.items():
            packed = tensor.detach().reshape(-1, *tensor.shape[-2:])
            wide = setting.group if name in ("out", "dq") else 1
            cut = [packed[a:b, head * wide : (head + 1) * wide] for a, b, head in setting.pairs()]
            found[name] = torch.cat([one.transpose(0, 1).flatten() for one in cut])
        return found

    def limit(self, case: Case) -> float:
        # float32 may be computed in TF32, which has float16's precision.
        dtype = torch.float16 if case["dtype"] == "float32" else getattr(torch, self.dtype(case))
        return LIMIT_ULPS * float(torch.finfo(dtype).eps)


def offsets_of(case: Case) -> tuple[int, ...]:
    """Where documents begin and end: every `seq` tokens, or for `varlen` after an uneven 1/16 to 1/2 of that."""
    batch, seq = int(case["batch"]), int(case["seq"])
    if not case["varlen"]:
        return tuple(range(0, batch * seq + 1, seq))
    dice = random.Random(f"{batch} {seq}")  # noqa: S311  # the same documents for every implementation and run
    offsets = [0]
    while offsets[-1] < batch * seq:
        offsets.append(min(offsets[-1] + dice.randint(max(1, seq // 16), max(1, seq // 2)), batch * seq))
    return tuple(offsets)


def truth_operations(length: int, dim: int, heads: int) -> float:
    return 4.0 * (1 + BACKWARD_TO_FORWARD) * length**2 * dim * heads


def truth_of(setting: Setting, begin: int, end: int, head: int) -> dict[str, torch.Tensor]:
    """softmax(q kᵀ · scale) v and its gradients in float64, of one document and kv head: [heads, tokens, dim] each.

    Rows of the score matrix are independent, so it is made a block of rows at a time.
    """
    wide = setting.group

    def cut(tensor: torch.Tensor, first: int, count: int) -> torch.Tensor:
        packed = tensor.detach().reshape(-1, *tensor.shape[-2:])
        return packed[begin:end, first : first + count].transpose(0, 1).double()

    q, grad = cut(setting.q, head * wide, wide), cut(setting.grad, head * wide, wide)
    k, v = cut(setting.k, head, 1)[0], cut(setting.v, head, 1)[0]
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    columns = torch.arange(end - begin, device=q.device)
    for one in range(wide):
        for top in range(0, end - begin, TRUTH_ROWS):
            rows = slice(top, top + TRUTH_ROWS)
            scores = q[one, rows] @ k.T * setting.scale
            if setting.causal:
                scores.masked_fill_(columns > columns[rows, None], -torch.inf)
            p = scores.softmax(-1)
            out[one, rows] = p @ v
            dv += p.T @ grad[one, rows]
            dp = grad[one, rows] @ v.T
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * setting.scale
            dq[one, rows] = ds @ k
            dk += ds.T @ q[one, rows]
    return {"out": out, "dq": dq, "dk": dk[None], "dv": dv[None]}


def reference(setting: Setting) -> tuple[Forward, str]:
    """The definition in plain torch, in the inputs' dtype; documents one after the other."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.transpose(-3, -2) for one in (q, _shared(k, setting), _shared(v, setting)))
        scores = q @ k.transpose(-2, -1) * setting.scale
        if setting.causal:
            length = q.shape[-2]
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(-3, -2)

    def packed() -> torch.Tensor:
        return torch.cat([attend(setting.q[a:b], setting.k[a:b], setting.v[a:b]) for a, b in setting.documents])

    return (packed if setting.varlen else lambda: attend(setting.q, setting.k, setting.v)), ""


def sdpa(backend: SDPBackend) -> Implementation:
    """torch's scaled_dot_product_attention, held to one backend; packed documents as nested (jagged) tensors."""

    def implementation(setting: Setting) -> tuple[Forward, str]:
        # The memory-efficient kernel takes no grouped heads, nor do nested tensors: models repeat keys and values.
        repeats = setting.group > 1 and (setting.varlen or backend is SDPBackend.EFFICIENT_ATTENTION)
        grouped = {"enable_gqa": True} if setting.group > 1 and not repeats else {}
        offsets = torch.tensor(setting.offsets, device=setting.q.device)
        lengths = [b - a for a, b in setting.documents]

        def nested(packed: torch.Tensor) -> torch.Tensor:
            made = torch.nested.nested_tensor_from_jagged(
                packed, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
            )
            return made.transpose(1, 2)

        def forward() -> torch.Tensor:
            inputs = [setting.q, setting.k, setting.v]
            if repeats:
                inputs[1:] = (_shared(one, setting) for one in inputs[1:])
            q, k, v = map(nested, inputs) if setting.varlen else (one.transpose(1, 2) for one in inputs)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=setting.causal, **grouped)
            out = out.transpose(1, 2)
            return out.values() if setting.varlen else out

        _tried(forward)
        notes = ["keys and values repeated"] if repeats else []
        return forward, "; ".join([*notes, *(["nested tensors"] if setting.varlen else [])])

    return implementation


def flash_attn(setting: Setting) -> tuple[Forward, str]:
    """The flash_attn package, by whichever backend it is built with."""
    if setting.q.device.type != "cuda":
        raise Missing("flash_attn needs a GPU")
    try:
        from flash_attn import flash_attn_func, flash_attn_interface, flash_attn_varlen_func
    except ImportError as error:
        raise Missing(f"flash_attn cannot be imported: {error}") from error
    backend = "CUDA"
    if torch.version.hip:
        asked = os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE", "").upper() == "TRUE"
        backend = "Triton" if getattr(flash_attn_interface, "USE_TRITON_ROCM", asked) else "CK"
    offsets = torch.tensor(setting.offsets, dtype=torch.int32, device=setting.q.device)
    longest = max(b - a for a, b in setting.documents)

    def packed() -> torch.Tensor:
        q, k, v = setting.q, setting.k, setting.v
        return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=setting.causal)

    def dense() -> torch.Tensor:
        return flash_attn_func(setting.q, setting.k, setting.v, causal=setting.causal)

    return (packed if setting.varlen else dense), f"flash_attn {version('flash_attn')}, {backend}"


def flex_attention(setting: Setting) -> tuple[Forward, str]:
    """torch's flex_attention, compiled; packed documents by a mask."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as uncompiled

    compiled = torch.compile(uncompiled, dynamic=False)
    tokens = setting.offsets[-1] if setting.varlen else int(setting.case["seq"])
    lengths = torch.tensor([b - a for a, b in setting.documents], device=setting.q.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=setting.q.device), lengths)

    def seen(batch: Any, head: Any, row: Any, column: Any) -> Any:
        inside = document[row] == document[column] if setting.varlen else row >= 0
        return inside & (row >= column) if setting.causal else inside

    mask = None
    if setting.causal or setting.varlen:
        mask = create_block_mask(seen, None, None, tokens, tokens, device=setting.q.device)

    def forward() -> torch.Tensor:
        q, k, v = (one[None] if setting.varlen else one for one in (setting.q, setting.k, setting.v))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=setting.group > 1).transpose(1, 2)
        return out[0] if setting.varlen else out

    return forward, "compiled"


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": reference,
    "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_math": sdpa(SDPBackend.MATH),
    "flash_attn": flash_attn,
    "flex_attention": flex_attention,
}
SUITE = Attention()


def _shared(tensor: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Keys or values [… tokens, kv heads, dim], each head repeated for its queries."""
    return tensor if setting.group == 1 else tensor.repeat_interleave(setting.group, dim=-2)


def _tried(forward: Forward) -> None:
    """One forward pass. Missing, with what torch warns of, where no kernel takes the case."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            forward()
        except RuntimeError as error:
            if not any(text in str(error) for text in NO_KERNEL):
                raise
            whys = [str(one.message).partition("(Triggered")[0].strip() for one in warned]
            # torch warns in pairs: "… kernel not used because:", then why; and of kernels that were not asked for.
            told = [
                why for why in dict.fromkeys(whys) if why and "not used because" not in why and "disabled" not in why
            ]
            raise Missing("; ".join(told)[:400] or "no kernel of this backend takes the case") from error
