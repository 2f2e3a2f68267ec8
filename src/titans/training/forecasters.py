"""Forecasters by a short description: ours, a library's and the linear ones, under one interface."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForTimeSeriesPrediction,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from titans.models.prediction import TitansForPrediction, TitansForPredictionOutput, TitansPredictionConfig
from titans.training.config import check_settings, nearest, refusals, require


class LinearForecasterConfig(PreTrainedConfig):
    """A linear forecaster.

    Args:
        context_length, prediction_length, num_input_channels: as in `TitansPredictionConfig`.
        kind: `"dlinear"` or `"nlinear"`.
        moving_average: rows of dlinear's trend, an odd number.
    """

    model_type = "linear_forecaster"

    context_length: int = 96
    prediction_length: int = 96
    num_input_channels: int = 1
    kind: str = "dlinear"
    moving_average: int = 25

    def __post_init__(self, **kwargs: Any):
        require(self.kind in KINDS, "kind", self.kind, nearest(self.kind, KINDS))
        require(self.moving_average % 2 == 1, "moving_average", self.moving_average, "an odd number")
        super().__post_init__(**kwargs)


class LinearForecaster(PreTrainedModel):
    """DLinear and NLinear of "Are Transformers Effective for Time Series Forecasting?" (arXiv 2205.13504).

    Maps from look-back to horizon, shared by all channels. dlinear: one of the trend, a moving average with the ends
    repeated, and one of the rest. nlinear: one of what is above the last row, which is added again.
    """

    config_class = LinearForecasterConfig
    main_input_name = "past_values"

    def __init__(self, config: LinearForecasterConfig):
        super().__init__(config)
        self.config: LinearForecasterConfig = config
        self.rest = nn.Linear(config.context_length, config.prediction_length)
        self.trend = nn.Linear(config.context_length, config.prediction_length) if config.kind == "dlinear" else None
        self.post_init()

    def forward(self, past_values: Tensor, future_values: Tensor | None = None) -> TitansForPredictionOutput:
        """[B, look-back, channels] -> [B, horizon, channels], and the mean squared error if the truth is given."""
        x = past_values.mT
        if self.trend is None:
            forecast = self.rest(x - x[..., -1:]) + x[..., -1:]
        else:
            half = self.config.moving_average // 2
            trend = F.avg_pool1d(F.pad(x, (half, half), mode="replicate"), self.config.moving_average, stride=1)
            forecast = self.rest(x - trend) + self.trend(trend)
        forecast = forecast.mT
        loss = None if future_values is None else F.mse_loss(forecast, future_values)
        return TitansForPredictionOutput(loss=loss, prediction_outputs=forecast)


AutoConfig.register("linear_forecaster", LinearForecasterConfig)
AutoModelForTimeSeriesPrediction.register(LinearForecasterConfig, LinearForecaster)
# The library has it in no Auto class, and passes over its own configurations without exist_ok.
AutoModelForTimeSeriesPrediction.register(PatchTSTConfig, PatchTSTForPrediction, exist_ok=True)

KINDS = ("dlinear", "nlinear")
# The paper's patches, and its head, which reads all of them; the library's own defaults are others.
PATCHTST = {"patch_length": 16, "patch_stride": 8, "pooling_type": None}
# type -> (config class, model class, defaults)
_FORECASTERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "titans": (TitansPredictionConfig, TitansForPrediction, {}),
    "patchtst": (PatchTSTConfig, PatchTSTForPrediction, PATCHTST),
    **{kind: (LinearForecasterConfig, LinearForecaster, {"kind": kind}) for kind in KINDS},
}


def build_forecaster(
    spec: dict[str, Any], *, context_length: int, prediction_length: int, num_input_channels: int, seed: int = 0
) -> PreTrainedModel:
    """A freshly initialised forecaster: `past_values` [B, look-back, channels], `future_values` [B, horizon, channels].

    Args:
        spec: `{"type": titans (default), patchtst, dlinear or nlinear, **fields of that model's configuration}`.
        context_length: look-back.
        prediction_length: horizon.
        num_input_channels: channels.
        seed: of the random initialisation.

    Raises:
        ValueError: an unknown type or key (the message names the nearest valid one), or a value the model refuses.
    """
    fields = dict(spec)
    kind = fields.pop("type", "titans")
    require(kind in _FORECASTERS, "model.type", kind, nearest(kind, _FORECASTERS))
    config_class, model_class, defaults = _FORECASTERS[kind]
    sizes = {
        "context_length": context_length,
        "prediction_length": prediction_length,
        "num_input_channels": num_input_channels,
    }
    valid = set(config_class.__dataclass_fields__) - set(sizes) - {"kind"}
    check_settings(kind, fields, valid)
    set_seed(seed)
    with refusals(spec, config_class.__name__):
        return model_class(config_class(**defaults | fields | sizes))
