"""Titans as a model of Time-Series-Library (https://github.com/thuml/Time-Series-Library)."""

from typing import Any

from torch import Tensor, nn

from titans.models.prediction import TitansForPrediction, TitansPredictionConfig
from titans.tasks.forecasting import small_model
from titans.training.config import require

TASKS = ("long_term_forecast", "short_term_forecast")
# its name -> ours
_SIZES = {"d_model": "hidden_size", "e_layers": "num_hidden_layers", "d_ff": "intermediate_size"}


class Model(nn.Module):
    """``TitansForPrediction``, every channel by itself, under the interface of Time-Series-Library.

    To drop it in, write a file ``models/Titans.py`` there that says ``from titans.forecasting.tslib import Model``, and
    run ``python run.py --model Titans --task_name long_term_forecast ...`` with its usual options (in versions whose
    ``exp/exp_basic.py`` lists the models by name, add it to that list). Marks of time and the decoder's input are not
    read, nor is ``dropout``, of which this model has none.

    Args:
        configs: ``seq_len``, ``pred_len`` and ``enc_in``; where they are there, ``task_name``, ``d_model``,
            ``e_layers``, ``d_ff`` and ``n_heads``. All else is as in ``small_model``.

    Raises:
        ValueError: a task that is no forecast; what ``TitansPredictionConfig`` raises.
    """

    def __init__(self, configs: Any):
        super().__init__()
        task = getattr(configs, "task_name", TASKS[0])
        require(task in TASKS, "task_name", task, " or ".join(TASKS))
        given = {ours: getattr(configs, theirs) for theirs, ours in _SIZES.items() if hasattr(configs, theirs)}
        if hasattr(configs, "n_heads"):
            given |= {"num_attention_heads": configs.n_heads, "num_memory_heads": configs.n_heads}
        lengths = {
            "context_length": configs.seq_len,
            "prediction_length": configs.pred_len,
            "num_input_channels": configs.enc_in,
        }
        self.core = TitansForPrediction(TitansPredictionConfig(**{**small_model(configs.seq_len), **given, **lengths}))

    def forward(
        self, x_enc: Tensor, x_mark_enc: Any = None, x_dec: Any = None, x_mark_dec: Any = None, mask: Any = None
    ) -> Tensor:
        """Past [B, seq_len, enc_in] -> future [B, pred_len, enc_in]; the other arguments are not read."""
        return self.core(x_enc).prediction_outputs
