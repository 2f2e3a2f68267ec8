"""One training run, through the transformers Trainer."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModel, PrinterCallback, TrainingArguments

from titans.training.callbacks import Clock, MetricsFile, ProgressBar, TensorBoard
from titans.training.checkpoints import last_checkpoint
from titans.training.config import TrainConfig
from titans.training.files import replace_durably, write_atomically
from titans.training.models import is_classifier
from titans.training.provenance import provenance
from titans.training.task import Task, TaskData
from titans.training.text import expand
from titans.training.trainer import SKIPPED, RunTrainer


def train(
    config: TrainConfig, task: Task, *, resume: bool = False, evaluate: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Trains one model and fills its run folder `config.output`.

    Args:
        resume: go on from the folder's last checkpoint (to results identical to an uninterrupted run's).
        evaluate: measure the task's metrics at the end; otherwise the validation loss alone.
        progress: show a progress bar.

    Returns:
        What `result.json` holds: validation loss, metrics (in the first process of several), speed, date, versions.

    Raises:
        FloatingPointError: the loss or the gradient is no longer finite, and `training.skip_nonfinite` is not set.
        MemoryError: the machine or the GPU has too little memory.
        OSError: a checkpoint cannot be written.
        ValueError: no checkpoint to resume from is whole.
    """
    if config.output is None:
        raise ValueError("output=None is not valid; use the folder the run is to fill")
    folder = Path(config.output)
    checkpoint = last_checkpoint(folder) if resume else None
    data = task.load(config)
    model = task.build_model(config, data)
    if config.training.start_from is not None:
        _load_weights(model, config.training.start_from)
    _check_enough(config, data)
    clock, tokens_per_step = Clock(), config.training.tokens_per_step
    use_cache = getattr(model.config, "use_cache", False)  # the Trainer turns it off, for training alone
    trainer = RunTrainer(
        model=model,
        args=_arguments(config, data, folder),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate,
        callbacks=[clock, MetricsFile(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard")],
        skip_nonfinite=config.training.skip_nonfinite,
        write_price_after=config.training.write_price_after,
    )
    if trainer.is_world_process_zero():
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(ProgressBar(clock, tokens_per_step))
    with _memory_hint(config):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = use_cache
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "validation_loss": trainer.state.best_metric,
        "tokens": config.training.steps * tokens_per_step,
        "tokens_per_second": clock.steps * tokens_per_step / max(clock.seconds, 1e-9),
        "training_seconds": clock.seconds,
        "skipped_steps": sum(SKIPPED in entry for entry in trainer.state.log_history),
        "provenance": provenance(),
    }
    weights = trainer.whole_weights()
    if not trainer.is_world_process_zero():
        return result
    if weights is not None:
        model = task.build_model(config, data)
        model.load_state_dict(weights)
        model.to(trainer.args.device)  # type: ignore[arg-type]
    _plot_loss(trainer.state.log_history, folder / "loss.png")
    model.eval()
    if evaluate:
        result["metrics"] = task.evaluate(model, data.tokenizer, config.data, config.evaluation)
        task.plot({folder.name: result["metrics"]}, folder / task.picture)
    _save(model, data, folder)
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    return result


def _load_weights(model: Any, run: str) -> None:
    """Puts the weights of another run in place of the model's own, which must be of the same kind and shape.

    A classifier takes the body of a language model, too.
    """
    path = Path(expand(run)) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"training.start_from={run!r} holds no model.safetensors; give the folder of a run")
    missing = unexpected = []
    try:
        config: Any = AutoConfig.from_pretrained(path.parent, local_files_only=True)
        if is_classifier(type(model).__name__) and not is_classifier(config.architectures[0]):
            body = AutoModel.from_pretrained(path.parent, local_files_only=True)
            model.base_model.load_state_dict(body.state_dict())  # the head is new
        else:
            missing, unexpected = load_model(model, path, strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"training.start_from={run!r} does not fit this model: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"training.start_from={run!r} does not fit this model: {path} lacks {missing or 'nothing'} and has "
            f"{unexpected or 'nothing'} beyond it; give the model of the run's config.yaml"
        )


def _arguments(config: TrainConfig, data: TaskData, folder: Path) -> TrainingArguments:
    training = config.training
    interval = training.eval_every * (training.steps if training.eval_every <= 1 else 1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if training.batch_size % processes:
        raise ValueError(
            f"training.batch_size={training.batch_size} is no multiple of the {processes} processes among which it is "
            "divided; use one, or another number of processes"
        )
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size // processes,
        per_device_eval_batch_size=training.batch_size // processes,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        activation_checkpointing=training.checkpoint_activations,
        ddp_find_unused_parameters=False,  # every parameter has a part in every step
        use_cpu=not torch.accelerator.is_available(),
        seed=training.seed,
        train_sampling_strategy="sequential" if data.ordered else "random",
        eval_strategy="steps",
        eval_steps=max(1, round(interval)),
        save_strategy="steps",
        save_steps=max(1, round(interval)),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=max(1, training.steps // 100),
        logging_nan_inf_filter=training.skip_nonfinite,
        prediction_loss_only=True,
        label_names=[data.labels],
        dataloader_drop_last=True,  # in training: a step is of one size
        report_to="none",
        log_level_replica="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process trains on one GPU; several are for several processes
    return arguments


@contextmanager
def _memory_hint(config: TrainConfig) -> Iterator[None]:
    """Says what to lower where the memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        training = config.training
        raise MemoryError(
            f"out of memory ({error}); halve training.batch_size (now {training.batch_size}) and double "
            f"training.gradient_accumulation (now {training.gradient_accumulation}) for steps of one size, or lower "
            f"training.length (now {training.length}) or a large model.chunk_size"
        ) from error


def _check_enough(config: TrainConfig, data: TaskData) -> None:
    size, items = config.training.batch_size, len(data.train)  # validation takes what there is
    if items < size:
        raise ValueError(
            f"training.batch_size={size} is more than the {items} items of the training data; use a smaller batch, a "
            "shorter training.length or more data"
        )


def _save(model: Any, data: TaskData, folder: Path) -> None:
    """Model and tokenizer at the run's top level, the weights last and each file whole."""
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if data.tokenizer is not None:
        data.tokenizer.save_pretrained(temporary)
    for path in sorted(temporary.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        replace_durably(path, folder / path.name)
    temporary.rmdir()


def _plot_loss(history: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
