"""Titans as a model of neuralforecast (https://nixtlaverse.nixtla.io/neuralforecast)."""

from typing import Any

from torch import Tensor

from titans.models.prediction import TitansForPrediction, TitansPredictionConfig
from titans.tasks.forecasting import small_model

try:
    from neuralforecast.common._base_model import BaseModel
    from neuralforecast.core import MODEL_FILENAME_DICT
    from neuralforecast.losses.pytorch import MAE
except ImportError as error:
    raise ImportError(
        f"the model of neuralforecast needs `neuralforecast` ({error}): pip install 'titans[forecast]'"
    ) from error


class Titans(BaseModel):
    """``TitansForPrediction``, every series by itself, for ``NeuralForecast(models=[Titans(h=12, input_size=24)])``.

    Series without exogenous variables; all steps at once. ``NeuralForecast.load`` knows this class once it is imported.

    Args:
        h: horizon, steps to forecast.
        input_size: look-back, steps it reads.
        model: fields of ``TitansPredictionConfig`` other than lengths and quantiles, in place of ``small_model``'s.
        loss: a point or quantile loss of neuralforecast, such as ``MAE()`` or ``MQLoss(level=[80])``.
        valid_loss: by default ``loss``.
        max_steps, learning_rate, val_check_steps, batch_size, valid_batch_size, windows_batch_size,
            inference_windows_batch_size, start_padding_enabled: as in every model of neuralforecast.
        kwargs: what else those have: ``scaler_type``, ``random_seed``, ``early_stop_patience_steps``, ``alias``...

    Raises:
        ValueError: a loss that wants a distribution; what ``TitansPredictionConfig`` raises.
    """

    EXOGENOUS_FUTR = False
    EXOGENOUS_HIST = False
    EXOGENOUS_STAT = False
    MULTIVARIATE = False
    RECURRENT = False

    def __init__(
        self,
        h: int,
        input_size: int,
        model: dict[str, Any] | None = None,
        loss: Any = MAE(),  # noqa: B008  as in every model of the library; it has no state
        valid_loss: Any = None,
        max_steps: int = 1000,
        learning_rate: float = 1e-3,
        val_check_steps: int = 100,
        batch_size: int = 32,
        valid_batch_size: int | None = None,
        windows_batch_size: int = 256,
        inference_windows_batch_size: int = 256,
        start_padding_enabled: bool = False,
        **kwargs: Any,
    ):
        if loss.is_distribution_output:
            raise ValueError(f"loss={type(loss).__name__} wants a distribution; use a point or quantile loss")
        super().__init__(
            h=h,
            input_size=input_size,
            loss=loss,
            valid_loss=valid_loss,
            max_steps=max_steps,
            learning_rate=learning_rate,
            val_check_steps=val_check_steps,
            batch_size=batch_size,
            valid_batch_size=valid_batch_size,
            windows_batch_size=windows_batch_size,
            inference_windows_batch_size=inference_windows_batch_size,
            start_padding_enabled=start_padding_enabled,
            **kwargs,
        )
        lengths = {"context_length": self.input_size, "prediction_length": h, "num_input_channels": 1}
        config = TitansPredictionConfig(**{**small_model(self.input_size), **(model or {}), **lengths})
        self.core = TitansForPrediction(config, loss.outputsize_multiplier)

    def forward(self, windows_batch: dict[str, Tensor]) -> Tensor:
        """``insample_y`` [B, look-back, 1] -> [B, horizon, what the loss wants of a step]."""
        return self.core.outputs(windows_batch["insample_y"]).squeeze(2)


MODEL_FILENAME_DICT["titans"] = Titans  # where NeuralForecast.save and load look for a model by its name
