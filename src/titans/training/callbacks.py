"""What watches a run: its clock, its metrics file, its progress bar."""

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from titans.training.files import write_atomically


class Clock(TrainerCallback, ExportableState):
    """Time spent in training steps alone, without evaluation and saving, nor a process's first step, which warms up.

    It is part of a checkpoint, so that a resumed run counts on.
    """

    def __init__(self):
        self.steps, self.seconds, self._start, self._warm = 0, 0.0, 0.0, False

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps, "seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved: Any = state.stateful_callbacks
        vars(self).update(saved["Clock"]["attributes"])

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self._warm:
            self.steps += 1
            self.seconds += time.perf_counter() - self._start
        self._warm = True


class MetricsFile(TrainerCallback):
    """All that was logged, one JSON a line; after a resume, without what an interrupted run had logged beyond it.

    A mean loss is logged wherever a checkpoint is saved, so that a resumed run takes its means over the same steps.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))


class TensorBoard(TensorBoardCallback):
    """TensorBoard events in a folder of our choice."""

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)


class ProgressBar(TrainerCallback):
    """One line: steps, loss, validation loss, speed, time left."""

    def __init__(self, clock: Clock, tokens_per_step: int):
        self.clock, self.tokens_per_step = clock, tokens_per_step
        self.columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total} steps",
                        TextColumn("{task.fields[figures]}"), TimeRemainingColumn())  # fmt: skip
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress(*self.columns, disable=not state.is_world_process_zero)
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        speed = self.clock.steps * self.tokens_per_step / max(self.clock.seconds, 1e-9)
        self.figures["speed"] = f"{speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=state.global_step, figures=", ".join(self.figures.values()))

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        for key, name in (("loss", "loss"), ("eval_loss", "validation")):
            if key in logs:
                self.figures[key] = f"{name} {float(logs[key]):.3f}"

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()
