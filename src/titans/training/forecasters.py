"""Forecasters by a short description: ours, a library's and the linear ones, under one interface."""

from typing import Any

import torch
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
        return _output(forecast.mT, future_values)


def _output(forecast: Tensor, truth: Tensor | None) -> TitansForPredictionOutput:
    loss = None if truth is None else F.mse_loss(forecast, truth)
    return TitansForPredictionOutput(loss=loss, prediction_outputs=forecast)


class ITransformerConfig(PreTrainedConfig):
    """An iTransformer.

    Args:
        context_length, prediction_length, num_input_channels: as in `TitansPredictionConfig`.
        hidden_size, n_heads, e_layers, d_ff, dropout: as in neuralforecast's `iTransformer`, smaller by default.
    """

    model_type = "itransformer"

    context_length: int = 96
    prediction_length: int = 96
    num_input_channels: int = 1
    hidden_size: int = 48
    n_heads: int = 4
    e_layers: int = 2
    d_ff: int = 96
    dropout: float = 0.1


class ITransformer(PreTrainedModel):
    """neuralforecast's iTransformer (arXiv 2310.06625): a channel's look-back is a token.

    Raises:
        ImportError: neuralforecast is not installed.
    """

    config_class = ITransformerConfig
    main_input_name = "past_values"

    def __init__(self, config: ITransformerConfig):
        try:
            from neuralforecast.models import iTransformer
        except ImportError as error:
            raise ImportError(
                f"itransformer needs `neuralforecast` ({error}): pip install 'titans[forecast]'"
            ) from error
        super().__init__(config)
        sizes = {name: getattr(config, name) for name in ("hidden_size", "n_heads", "e_layers", "d_ff", "dropout")}
        seed = torch.initial_seed() % 2**32  # the library seeds all with what it is given
        lengths = {"h": config.prediction_length, "input_size": config.context_length}
        self.network = iTransformer(**lengths, **sizes, n_series=config.num_input_channels, random_seed=seed)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The library has initialised them."""

    def forward(self, past_values: Tensor, future_values: Tensor | None = None) -> TitansForPredictionOutput:
        """[B, look-back, channels] -> [B, horizon, channels], and the mean squared error if the truth is given."""
        return _output(self.network.forecast(past_values), future_values)


AutoConfig.register("linear_forecaster", LinearForecasterConfig)
AutoModelForTimeSeriesPrediction.register(LinearForecasterConfig, LinearForecaster)
AutoConfig.register("itransformer", ITransformerConfig)
AutoModelForTimeSeriesPrediction.register(ITransformerConfig, ITransformer)
# The library has it in no Auto class, and passes over its own configurations without exist_ok.
AutoModelForTimeSeriesPrediction.register(PatchTSTConfig, PatchTSTForPrediction, exist_ok=True)

KINDS = ("dlinear", "nlinear")
# The paper's patches, its head, which reads all of them, and its dropout; the library's own defaults are others.
PATCHTST = {
    "patch_length": 16,
    "patch_stride": 8,
    "pooling_type": None,
    "positional_dropout": 0.2,
    "path_dropout": 0.2,
    "ff_dropout": 0.2,
}
# type -> (config class, model class, defaults)
_FORECASTERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "titans": (TitansPredictionConfig, TitansForPrediction, {}),
    "patchtst": (PatchTSTConfig, PatchTSTForPrediction, PATCHTST),
    "itransformer": (ITransformerConfig, ITransformer, {}),
    **{kind: (LinearForecasterConfig, LinearForecaster, {"kind": kind}) for kind in KINDS},
}


def build_forecaster(
    spec: dict[str, Any], *, context_length: int, prediction_length: int, num_input_channels: int, seed: int = 0
) -> PreTrainedModel:
    """A freshly initialised forecaster: `past_values` [B, look-back, channels], `future_values` [B, horizon, channels].

    Args:
        spec: `{"type": titans (default), patchtst, itransformer, dlinear or nlinear, **fields of its configuration}`.
        context_length: look-back.
        prediction_length: horizon.
        num_input_channels: channels.
        seed: of the random initialisation.

    Raises:
        ImportError: an itransformer without neuralforecast.
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
