"""One of two processes that share a frozen base out: its gradients are those over the whole base, to the bit.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.work.sharded_processes FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from radeon_stack.contracts.finetune import Quantization
from radeon_stack.kernels.adapters import add_experts_lora, can_spare, use_nf4_linear
from radeon_stack.kernels.recompute import use_recompute
from radeon_stack.runs.events import Fact
from radeon_stack.workloads.finetune import base, ranks
from radeon_stack.workloads.ranks import rank
from tests.work.test_training import job_in

BASES = {
    "nf4": Quantization(double=False),
    "nf4 twice": Quantization(double=True),
    "nf4, experts in 16 bit": Quantization(experts="none"),
    "16 bit": Quantization(kind="none"),
    "fp8": Quantization(kind="fp8"),
}
ROWS = torch.arange(24).view(2, 12) * 7 % 97
Gradients = dict[str, torch.Tensor]


def main(folder: Path) -> None:
    ranks.join(rank())
    told = {name: case(folder, name, quantization) for name, quantization in BASES.items()}
    (folder / f"told-{rank().number}.json").write_text(json.dumps(told))
    ranks.part()


def case(folder: Path, name: str, quantization: Quantization) -> dict[str, Any]:
    """{"shares": as told, "whole" and "held": bytes of the model, "same": by way back, whether gradients are equal}."""
    job, events = job_in(folder / f"{name}-{rank().number}")
    job.rank = rank()
    plain = adapted(base.load_for_training(job, folder / "model", quantization, torch.bfloat16), quantization)
    wanted, whole = gradients(plain), base.memory(plain)
    del plain
    loaded = base.load_for_training(job, folder / "model", quantization, torch.bfloat16, parallel="sharded")
    shared = adapted(loaded, quantization)
    shares = next(event.value for event in events if isinstance(event, Fact) and event.name == "shares")
    same = {"kept": same_as(wanted, gradients(shared))}
    shared.activation_checkpointing_enable({"use_reentrant": False})
    same["computed again"] = same_as(wanted, gradients(shared))
    assert use_recompute(shared, can_spare)
    same["ours"] = same_as(wanted, gradients(shared)) and same_as(wanted, gradients(shared))
    return {"shares": shares, "whole": whole, "held": base.memory(shared), "same": same}


def adapted(model: Any, quantization: Quantization) -> Any:
    """With adapters that do something: of experts too, where they are grouped."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    # NF4 by our layer and by PEFT's own.
    model = get_peft_model(model, use_nf4_linear(config) if quantization.double else config)
    if quantization.kind == "nf4" and quantization.experts == "nf4":
        add_experts_lora(model, 4, 4.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.enable_input_require_grads()
    return model.train()


def gradients(model: Any) -> Gradients:
    """Of both rows: each process has one of them."""
    model.zero_grad()
    ranks.leave_to_each_process(model)
    mine = ROWS[rank().number : rank().number + 1]
    DistributedDataParallel(model)(input_ids=mine, labels=mine).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def same_as(wanted: Gradients, found: Gradients) -> bool:
    assert wanted.keys() == found.keys() and wanted
    return all(torch.equal(wanted[name], found[name]) for name in wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
