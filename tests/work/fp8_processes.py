"""One of two processes that train over an FP8 base: its gradients of its own row, and what both agree upon.

python -m torch.distributed.run --standalone --nproc-per-node 2 fp8_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from radeon_stack.contracts.finetune import Quantization
from radeon_stack.workloads.finetune import base, ranks
from tests.work.test_training import adapted, job_in


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    job = job_in(folder / f"process-{rank}")[0]
    model = adapted(base.load_for_training(job, folder / "model", Quantization(kind="fp8"), torch.float32))
    ranks.leave_to_each_process(model)
    rows = torch.arange(24).view(2, 12) * 7 % 1000

    def gradients(of: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        of.zero_grad()
        of(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    together = gradients(DistributedDataParallel(model), rows[rank : rank + 1])
    alone = gradients(model, rows)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
    (folder / f"agreed-{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
