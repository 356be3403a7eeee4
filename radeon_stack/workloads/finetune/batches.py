"""Batches of rows in packs, or of rows of like length, for the trainer."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from radeon_stack.workloads.finetune.adapter import load_into
from radeon_stack.workloads.finetune.encoding import IGNORED, Encoded
from radeon_stack.workloads.finetune.loss import Tally, loss_of
from radeon_stack.workloads.finetune.optimizer import without_waiting
from radeon_stack.workloads.finetune.packing import Pack


class RowsTrainer(SFTTrainer):
    """TRL's trainer; `grouped` by length once `group` was called, on packs once `take_packs` was. With a `tally` its
    figures wait on the device until a step is told.

    A checkpoint's adapter is taken up in the dtype that it was trained in. Twice a batch transformers walks through all
    modules, to put them in the mode that they are in and to count the parameters it counted before; here once.
    """

    grouped: ByLength | None = None
    tally: Tally | None = None
    miscounts = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        set_mode_once(self.model)
        self._operations: int | None = None  # of a step, for each token

    def train(self, *arguments: Any, **named: Any) -> Any:
        """TRL's; what there is by now is no garbage until the end: looking through it held a step up for 0.33 s."""
        gc.collect()
        gc.freeze()
        try:
            return super().train(*arguments, **named)
        finally:
            gc.unfreeze()

    def create_optimizer(self, *arguments: Any, **named: Any) -> torch.optim.Optimizer:
        """transformers', without bitsandbytes' waiting."""
        return without_waiting(super().create_optimizer(*arguments, **named))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; its figures are left on the device."""
        if self.tally is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**inputs, fused_lm_head=True)
        self.tally.add(output, inputs)
        loss = loss_of(output, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # they count all processes' tokens, and gradients are averaged
        return loss.to(self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' own: 6 · tokens · parameters without embeddings."""
        if self._operations is None:
            self._operations = 6 * self.model.num_parameters(exclude_embeddings=True)
        return self._operations * int(inputs["input_ids"].numel())

    def group(self, lengths: list[int], seed: int) -> ByLength:
        """Have rows of like length together; the same of all processes and attempts, and of any for a global batch."""
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.grouped = ByLength(lengths, step, seed)
        self.add_callback(Epochs(self.grouped))
        return self.grouped

    def take_packs(self, *, flat: bool) -> None:
        """Keep rows of packs apart: a batch is one sequence for flash attention (`flat`), else a sequence a pack."""
        padding: int = self.processing_class.pad_token_id
        self.data_collator = DataCollatorForLanguageModeling(padding, padding_free=True) if flat else Packs(padding)
        self.miscounts = not flat

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_into(self.model, Path(resume_from_checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.grouped if self.grouped is not None else super()._get_train_sampler(train_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self.tally is not None:
            self._metrics[mode].update(self.tally.take(self.accelerator.gather, train=mode == "train"))
        if self.miscounts:
            # Where no mask says what is padding, that counts too.
            self._metrics["train"].pop("num_tokens", None)
        super().log(logs, start_time)


def set_mode_once(model: torch.nn.Module) -> None:
    """Have `train()` and `eval()` do nothing where they put the model in that mode before.

    What it is in by itself says little: a wrapper that is new trains, and what it wraps may not.
    """
    walk = model.train
    last: bool | None = None

    def train(mode: bool = True) -> torch.nn.Module:
        nonlocal last
        if mode != last:
            walk(mode)
            last = mode
        return model

    model.train = train


class Packs:
    """A batch of packs, each one sequence: int64 (packs, tokens of the longest).

    Positions begin anew at each row, and there is no attention mask: from that, transformers' masks keep rows apart
    (`masking_utils.find_packed_sequence_indices`), with sliding windows too. Each padded place is a row of its own.
    Flash attention would not see it (5.23): it wants all packs of a batch as one sequence, as TRL's own padding-free
    batches are; elsewhere those would cost a mask of the square of that length.
    """

    def __init__(self, padding: int) -> None:
        self._collate = DataCollatorForLanguageModeling(padding, return_position_ids=True)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collate(examples)
        del batch["attention_mask"]
        # Else a row's first token were learnt from the row before.
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch


class ByLength(LengthGroupedSampler):
    """transformers' order by length; an epoch's follows from `seed` and its number alone.

    transformers' own takes it from torch's global state of chance, which neither a resumed run nor another process has.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        super().__init__(batch, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """From now on the order of this epoch, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


class Epochs(TrainerCallback):
    """Tells an order which epoch begins, or is taken up again.

    accelerate (1.15) does so itself, but for other samplers than its own not in the epoch in which a run of several
    processes is resumed: it would have the first one's order.
    """

    def __init__(self, order: ByLength) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))  # at an epoch's end it is a whole number


def dataset(rows: Sequence[Encoded] | Sequence[Pack]) -> Dataset:
    """The rows or packs as TRL's trainer takes them."""
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    lengths = [row.lengths for row in rows if isinstance(row, Pack)]
    return Dataset.from_dict(columns | ({"seq_lengths": lengths} if lengths else {}))
