"""A fine-tune's speed and memory on the GPU that is here: ours beside stock TRL + PEFT + bitsandbytes.

    PYTHONPATH=. python benchmarks/train_speed.py [--out FILE] [--only llama,qwen,…] [--with ours,stock] [--commit HASH]

Models of the real shapes with random weights, drawn tensor by tensor where a checkpoint would be read: what is measured
is the loader's own way, without a disk. Rank 64, adamw_8bit, bf16, activation checkpointing, the sequences all of one
length. Each implementation runs in a process of its own; a step's time is the median of those after the first ones.
`qwen-whole` is all of Qwen3-30B-A3B with torch held to an R9700's 29.86 GiB.
`--smoke` is the same code on tiny sizes, on a CPU too: its times say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # in the place of this folder: its file names are none of a library's business
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

R9700_GIB = 29.86
STEPS, WARM_UP = 13, 4
CHILD_SECONDS = 400
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """One model and batch; `cap` GiB of GPU memory, or all there is; `experts_rank` adapters an expert too."""

    kind: str
    sizes: Mapping[str, Any]
    length: int
    batch: int
    accumulation: int
    targets: Sequence[str] | str = "all-linear"
    experts_rank: int = 0
    cap: float | None = None
    double: bool = True


CASES: Mapping[str, Case] = {
    "llama-short": Case("Llama", LLAMA, 60, 5, 2),
    "llama": Case("Llama", LLAMA, 2048, 4, 1),
    "qwen-short": Case("Qwen3Moe", {**QWEN, "num_hidden_layers": 8}, 60, 5, 2, ATTENTION, double=False),
    "qwen": Case("Qwen3Moe", {**QWEN, "num_hidden_layers": 8}, 2048, 4, 1, ATTENTION, double=False),
    "qwen-whole": Case("Qwen3Moe", QWEN, 512, 1, 2, ATTENTION, cap=R9700_GIB, double=False),
    "qwen-whole-experts": Case("Qwen3Moe", QWEN, 512, 1, 2, ATTENTION, 8, R9700_GIB, False),
}
SMOKE: Mapping[str, Case] = {
    "llama": Case("Llama", TINY, 12, 2, 1),
    "qwen": Case("Qwen3Moe", TINY, 12, 2, 2, ATTENTION, 4, None, False),
}
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


class Drawn:
    """A tensor of a checkpoint that is drawn when it is read. transformers reads by slicing."""

    def __init__(self, shape: Sequence[int], std: float) -> None:
        self.shape, self.std = torch.Size(shape), std

    def __getitem__(self, _: Any) -> torch.Tensor:
        made = torch.empty(self.shape, dtype=torch.bfloat16, device=device())
        return made.normal_(0, self.std) if self.shape[1:] else made.fill_(1)


def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def load(case: Case, quantization: Any) -> Any:
    """A model from a checkpoint of random numbers, through transformers' own loading."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, f"{case.kind}ForCausalLM")
    config = getattr(transformers, f"{case.kind}Config")(**case.sizes)
    with torch.device("meta"):
        names = revert_weight_conversion(empty := kind(config), dict(empty.state_dict()))
    checkpoint = {name: Drawn(tensor.shape, 0.02) for name, tensor in names.items()}
    where = {"device_map": {"": device()}, "dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    return kind.from_pretrained(None, config=config, state_dict=checkpoint, quantization_config=quantization, **where)


def tokenizer() -> Any:
    """Something to pad with."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "a", "eos_token": "b"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1})), **special)


def settings(case: Case) -> Any:
    """The recipe's configuration for a case."""
    from radeon_stack.contracts.finetune import FinetuneConfig

    told = {
        "model": "random",
        "quantization": {"double": case.double},
        "lora": {"target_modules": case.targets, "experts_rank": case.experts_rank},
        "train": {
            "steps": STEPS,
            "batch_size": case.batch,
            "gradient_accumulation": case.accumulation,
            "checkpoint_every": 1000,
        },
    }
    return FinetuneConfig.model_validate(told)


def rows(case: Case, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    most = int(case.sizes["vocab_size"])
    return [torch.randint(2, most, (case.length,), generator=generator).tolist() for _ in range(count)]


def ours(case: Case, folder: Path) -> Any:
    """The trainer as `train-llama` and `train-qwen-moe` make it."""
    from radeon_stack.kernels.liger import use_liger
    from radeon_stack.workloads.finetune import base, training
    from radeon_stack.workloads.finetune.encoding import Encoded
    from radeon_stack.workloads.job import Arguments, Job

    config = settings(case)
    model = load(case, base.quantization_config(config.quantization, torch.bfloat16))
    job = Job(Arguments(folder, folder, "", None, False), lambda event: None)
    data = [Encoded(ids, ids, "") for ids in rows(case, STEPS * case.batch * case.accumulation)]
    model = base.ready(model, config.quantization)
    use_liger(model)
    return training.trainer_for(job, config, model, tokenizer(), data)


def stock(case: Case, folder: Path) -> Any:
    """TRL's trainer, PEFT's adapter and bitsandbytes' loading, as their documentation puts them together."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTTrainer

    from radeon_stack.workloads.finetune.training import sft_arguments

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = load(case, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **nf4))
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=case.targets, task_type="CAUSAL_LM")
    data = rows(case, STEPS * case.batch * case.accumulation)
    return SFTTrainer(
        model,
        args=sft_arguments(settings(case), folder),
        train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
        processing_class=tokenizer(),
        peft_config=lora,
    )


IMPLEMENTATIONS = {"ours": ours, "stock": stock}


def measured(name: str, implementation: str, *, smoke: bool) -> dict[str, Any]:
    """The child's side: load, train, and tell."""
    from transformers import TrainerCallback

    case = (SMOKE if smoke else CASES)[name]
    gpu = torch.cuda.is_available()
    if gpu and case.cap:
        torch.cuda.set_per_process_memory_fraction(case.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        trainer = IMPLEMENTATIONS[implementation](case, Path(folder))
        loaded = {"seconds": time.monotonic() - begun, "peak_gib": peak(), "host_gib": host_gib()}
        reset_peak()
        trainer.add_callback(Watch())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    steps = [after - before for before, after in itertools.pairwise(times)][WARM_UP - 1 :]
    median = statistics.median(steps)
    return {
        "case": name,
        "implementation": implementation,
        "settings": asdict(case),
        "step_seconds": median,
        "step_seconds_all": steps,
        "tokens_per_second": case.length * case.batch * case.accumulation / median,
        "peak_gib": peak(),
        "load": loaded,
        "trained": trained,
        "losses": losses,
    }


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def host_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "train_speed.json")
    parser.add_argument("--only", default="", help=f"of {','.join(CASES)}")
    parser.add_argument("--with", dest="implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--commit", default="", help="where this folder is no repository")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "IMPLEMENTATION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, implementation, file = arguments.child
        Path(file).write_text(json.dumps(measured(case, implementation, smoke=arguments.smoke)))
        return
    cases = SMOKE if arguments.smoke else CASES
    wanted = [name for name in cases if not arguments.only or name in arguments.only.split(",")]
    found = []
    for name in wanted:
        for implementation in arguments.implementations.split(","):
            if implementation == "stock" and cases[name].cap:
                continue  # its experts stay in 16 bit: 57 GB
            found.append(apart(name, implementation, arguments.smoke))
            print(line(found[-1]), flush=True)
            save(arguments.out, found, arguments.commit)


def apart(name: str, implementation: str, smoke: bool) -> dict[str, Any]:
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "told.json")
        command = [sys.executable, str(Path(__file__)), *(["--smoke"] if smoke else [])]
        begun, common = time.monotonic(), {"case": name, "implementation": implementation}
        try:
            done = subprocess.run(
                [*command, "--child", name, implementation, str(file)],
                cwd=ROOT, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**common, "failed": f"no end in {CHILD_SECONDS} s"}
        seconds = time.monotonic() - begun
        if not file.is_file():
            return {**common, "failed": done.stderr[-2000:], "process_seconds": seconds}
        told: dict[str, Any] = json.loads(file.read_text())
        return {**told, "process_seconds": seconds}


def line(one: Mapping[str, Any]) -> str:
    head = f"{one['case']:<20} {one['implementation']:<6}"
    if "failed" in one:
        return f"{head} failed: {' '.join(one['failed'].split())[-300:]}"
    load, losses = one["load"], one["losses"]
    return (
        f"{head} {one['step_seconds']:.3f} s/step · {one['tokens_per_second']:,.0f} tokens/s · "
        f"{one['peak_gib']:.2f} GiB · "
        f"loaded in {load['seconds']:.0f} s, {load['peak_gib']:.2f} GiB, host {load['host_gib']:.1f} GiB · "
        f"{one['trained']:,} trained · loss {losses[0]:.3f} → {losses[-1]:.3f}"
    )


def save(path: Path, found: Sequence[Mapping[str, Any]], commit: str) -> None:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    record = {
        "card": {"name": gpu.name, "memory": gpu.total_memory} if gpu else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "measured": list(found),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
