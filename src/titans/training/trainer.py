"""The transformers Trainer, with what our runs ask of it beyond that."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from titans.memory.state import save_tensors
from titans.models import TitansCache
from titans.training.carried import load_rows, memory_file
from titans.training.checkpoints import checkpoint_name, publish_checkpoint
from titans.training.files import read_manifest
from titans.training.streamed import StreamedWindows

SKIPPED = "skipped_step"  # in the log
_NO_DECAY = re.compile(r"(^|\.)(gates_proj|bias|\w*norm\w*|persistent\w*|conv|skip|memory\.weights)(\.|$)")


class RunTrainer(Trainer):
    """The Trainer with eight differences.

    All of the validation data counts, what fills no batch included. Checkpoints are whole or not there. A step whose
    loss or gradient is not finite never reaches the weights: it stops the run and leaves what reproduces it, or is
    skipped. Gates and norms do not decay. Logits are worked out where a label is, and nowhere else. Where a batch says
    which of its rows begin a document or a series (``titans.training.carried``), the others go on with the memory of
    the batch before, in validation as well. Writing may cost nothing at first. Under FSDP2, too, bfloat16 is
    autocast's, and whatever is written for others to read holds all of the weights.

    Args:
        skip_nonfinite: skip steps that are not finite instead of stopping.
        write_price_after: fraction of the steps before the model's ``memory_write_price`` is asked.
    """

    def __init__(self, *args: Any, skip_nonfinite: bool = False, write_price_after: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:  # autocast instead: its own bfloat16 would round M_0 and the states, too
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = None
        self.skip_nonfinite, self.write_price_after = skip_nonfinite, write_price_after
        self.carried: TitansCache | None = None
        self._before: TitansCache | None = None  # what was carried before the step
        self._batches: list[dict[str, Any]] = []  # of the step
        self._losses: list[torch.Tensor] = []  # one a batch
        self._run_dir: str | None = None  # where a checkpoint is being written

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if p.ndim >= 2 and not _NO_DECAY.search(name)]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if best := self.state.best_global_step:  # a state that is loaded names the path where the run stood then
            self.state.best_model_checkpoint = str(Path(self.args.output_dir or "") / checkpoint_name(best))
        if self.state.global_step < self.state.max_steps:  # the Trainer takes one step more when all were done
            super()._run_epoch(*args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        self.args.dataloader_drop_last, training = False, self.args.dataloader_drop_last
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = training

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._price_of_writing(), self._labelled_logits(inputs) as inputs:
            if "begins" not in inputs:
                return super().compute_loss(model, inputs, *args, **kwargs)
            cache = TitansCache(len(self._titans().model.layers)) if self.carried is None else self.carried
            loss = super().compute_loss(model, {**inputs, "cache": cache}, *args, **kwargs)
            self.carried = cache.detach_()  # gradients stop at a window's start
            return loss

    @contextmanager
    def _price_of_writing(self) -> Iterator[None]:
        """None before its time; a baseline knows no such price."""
        config = self._titans().config
        price = getattr(config, "memory_write_price", 0.0)
        if not price or self.state.global_step >= self.write_price_after * self.state.max_steps:
            yield
            return
        config.memory_write_price = 0.0
        try:
            yield
        finally:
            config.memory_write_price = price

    @contextmanager
    def _labelled_logits(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The inputs, such that a causal language model works out logits [1, N, vocab_size] for their N labels."""
        head = self._titans().get_output_embeddings()
        # A token's logits are for the label after it
        if head is None or (labelled := inputs["labels"][:, 1:] != -100).all():
            yield inputs
            return
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, :-1][labelled][None],))
        try:
            yield {**inputs, "shift_labels": inputs["labels"][:, 1:][labelled][None]}
        finally:
            handle.remove()

    # The memory carried from batch to batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        training, self.carried = self.carried, None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.carried = training

    def _titans(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _save_memory(self, cache: TitansCache | None, folder: Path) -> None:
        if cache is not None:
            with self._whole_model() as model:
                cache.save_pretrained(memory_file(folder, self.args.process_index), model)

    # Weights of which each process holds a share (FSDP2)

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def whole_weights(self) -> dict[str, Any] | None:
        """All weights, in process 0; None where every process holds them all."""
        return self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None

    @contextmanager
    def _whole_model(self) -> Iterator[Any]:
        """The model with all of its weights, in every process."""
        model = self._titans()
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.unshard()
        try:
            yield model
        finally:
            for module in sharded:
                module.reshard()

    # Steps that are not finite

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._batches, items = super().get_batch_samples(*args, **kwargs)
        self._losses, self._before = [], None if self.carried is None else self.carried.copy()
        return self._batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last word before the optimizer moves the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)
        values: Any = torch.stack([*self._losses, norm.to(self._losses[0])])
        values = self.accelerator.gather(values)
        if not torch.isfinite(values).all():  # the same in every process
            self._not_finite(model, values)
        return grad_norm

    def _not_finite(self, model: nn.Module, values: torch.Tensor) -> None:
        step = self.state.global_step + 1
        if self.skip_nonfinite:
            model.zero_grad()  # to None: the optimizer leaves weights and moments alone
            self.carried = None  # what was read may be what is not finite
            self.log({SKIPPED: step})
            return
        folder = Path(self.args.output_dir or "").parent / f"nonfinite-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.whole_weights()
        if self.args.should_save:
            self._save(str(folder), state_dict=weights)
        batches = {name: torch.stack([batch[name] for batch in self._batches]) for name in self._batches[0]}
        save_tensors(batches, folder / f"batches-{self.args.process_index}.safetensors", {"step": str(step)})
        self._save_memory(self._before, folder)
        raise FloatingPointError(
            f"step {step} is not finite: losses and gradient norm are {values.tolist()}; {folder} holds its batches "
            f"and the weights before it. Lower training.learning_rate (now {self.args.learning_rate}), lengthen "
            "training.warmup, or set training.skip_nonfinite"
        )

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint in a folder beside the others and gives it its name once it is whole."""
        folder = Path(self.args.output_dir or "")
        part, name = folder / ".part", checkpoint_name(self.state.global_step)
        try:
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
                (part / name).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._run_dir = str(part)
            self._save_memory(self.carried, part / name)
            if self.args.should_save and isinstance(self.train_dataset, StreamedWindows):
                batches = self.state.global_step * self.args.gradient_accumulation_steps
                self.train_dataset.save(part / name, batches * self._train_batch_size * self.args.world_size)
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(folder / checkpoint_name(self.state.best_global_step))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(part / name / TRAINER_STATE_NAME))
                publish_checkpoint(part / name, folder / name, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has its own types for a full disk
            raise OSError(
                f"{folder / name} cannot be written ({error}); the disk has {shutil.disk_usage(folder).free:,} bytes "
                "left. Those before it are as they were: make room, then go on with "
                f"titans train --resume {folder.parent}"
            ) from error
        finally:
            self._run_dir = None
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        each, process, processes = self._train_batch_size, self.args.process_index, self.args.world_size
        rows = range(process * each, (process + 1) * each)
        with self._whole_model() as whole:
            self.carried = load_rows(resume_from_checkpoint, rows, processes * each, whole)
        if isinstance(self.train_dataset, StreamedWindows):
            self.train_dataset.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        try:
            read_manifest(best)
        except ValueError as error:
            raise ValueError(
                f"{error}; restore the best checkpoint from a copy, or delete {best}: a resume keeps the last weights"
            ) from error
        super()._load_best_model()
