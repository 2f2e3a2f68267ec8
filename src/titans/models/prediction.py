"""Titans as a forecaster: normalise, patches as tokens, blocks, head, undo the normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction
from transformers.utils.generic import ModelOutput

from titans.models.cache import TitansCache
from titans.models.causal_lm import TitansModel, TitansPreTrainedModel
from titans.models.configuration import TitansConfig, linear_start
from titans.models.stream import TitansStream


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raises ValueError unless they are numbers between 0 and 1 in ascending order, 0.5 among them."""
    ascending = all(isinstance(q, float) and 0 < q < 1 for q in quantiles) and list(quantiles) == sorted(set(quantiles))
    if not ascending or 0.5 not in quantiles:
        raise ValueError(
            f"quantiles={quantiles!r} is not valid; use numbers between 0 and 1 in ascending order, 0.5 among them, "
            "such as [0.1, 0.5, 0.9]"
        )


def pinball(forecasts: Tensor, truth: Tensor, quantiles: Sequence[float]) -> Tensor:
    """The pinball loss (Koenker and Bassett 1978) of forecasts [..., Q] of each quantile, truth [...] -> [..., Q].

    Q times what lies above the forecast, 1 - Q times what lies below it: least, on average, at the quantile.
    """
    above = truth.unsqueeze(-1) - forecasts
    levels = forecasts.new_tensor(quantiles)
    return torch.maximum(levels * above, (levels - 1) * above)


class TitansPredictionConfig(TitansConfig):
    """A Titans forecaster: what ``TitansConfig`` has, and the fields below, named as in transformers' PatchTST.

    ``vocab_size``, ``tie_word_embeddings`` and ``use_cache`` mean nothing here; lengths in tokens count patches.

    Args:
        context_length: look-back, rows the model reads.
        prediction_length: horizon, rows it forecasts.
        num_input_channels: numbers in a row.
        patch_length: rows of a patch; a patch is a token.
        patch_stride: rows from one patch to the next.
        channel_mixing: a token holds the patches of all channels; otherwise every channel is read by itself.
        dropout: share of the numbers in the tokens, and in what the blocks find, that are set to 0 in training.
        quantiles: what is forecast of every number to come, such as ``[0.1, 0.5, 0.9]``: ascending, between 0 and 1,
            0.5 among them. None: one number, trained by its squared error.

    Raises:
        ValueError: as ``TitansConfig``.
    """

    model_type = "titans_prediction"

    context_length: int = 96
    prediction_length: int = 96
    num_input_channels: int = 1
    patch_length: int = 16
    patch_stride: int = 8
    channel_mixing: bool = False
    dropout: float = 0.0
    quantiles: list[float] | None = None

    @property
    def num_patches(self) -> int:
        """Tokens of the look-back; its oldest rows are left out where the patches do not fit evenly."""
        return (self.context_length - self.patch_length) // self.patch_stride + 1

    def _check(self) -> None:
        super()._check()
        for name in ("context_length", "prediction_length", "num_input_channels", "patch_length", "patch_stride"):
            self._check_positive(name)
        if self.patch_length > self.context_length:
            raise ValueError(
                f"patch_length={self.patch_length} is longer than context_length={self.context_length}; shorten it"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not valid; use a number from 0 to below 1")
        if self.memory_write_price:
            raise ValueError(f"memory_write_price={self.memory_write_price} is for language models; leave it at 0")
        if self.quantiles is not None:
            check_quantiles(self.quantiles)


@dataclass
class TitansForPredictionOutput(ModelOutput):
    """A forecast.

    Attributes:
        loss: where the truth is known, the mean squared error of ``prediction_outputs``; with ``config.quantiles`` the
            mean pinball loss of ``quantile_outputs``.
        prediction_outputs: [B, horizon, channels]; with quantiles, the median.
        quantile_outputs: [B, horizon, channels, Q], ascending; None without quantiles.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    quantile_outputs: Tensor | None = None


class TitansForPrediction(TitansPreTrainedModel):
    """A Titans forecaster (arXiv 2501.00663, table 3), all steps of the horizon at once.

    Each channel of a window is brought to mean 0 and standard deviation 1 and the forecast is brought back (reversible
    instance normalisation, Kim et al. 2022, without its affine map), so that a window shifted and scaled has its
    forecast shifted and scaled. Patches are tokens (PatchTST, arXiv 2211.14730); what the blocks find is added to them,
    and one linear map leads from all patches of a channel to its horizon.

    Channels are rows of the batch, or with ``config.channel_mixing`` share the tokens, as in Simba (arXiv 2403.15360),
    in which the paper puts the memory in place of Mamba.

    The memory of a window is M_0, unless a cache is given or a series goes on (``update``): the memory then learns from
    every block of ``context_length`` rows, each read once, as a window of its own.

    Args:
        config: sizes.
        outputs_per_step: numbers forecast of every number to come; by default one, or one a quantile.
    """

    config_class = TitansPredictionConfig
    main_input_name = "past_values"

    def __init__(self, config: TitansPredictionConfig, outputs_per_step: int | None = None):
        super().__init__(config)
        self.config: TitansPredictionConfig = config
        outputs = outputs_per_step or len(config.quantiles or [0.5])
        width = config.patch_length * (config.num_input_channels if config.channel_mixing else 1)
        self.in_proj = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.model = TitansModel(config)
        self.model.embed_tokens = None  # type: ignore[assignment]  # patches come as inputs_embeds
        self.out_proj = nn.Linear(config.hidden_size, width)
        self.head = nn.Linear(config.num_patches * config.patch_length, config.prediction_length * outputs)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The head reads a whole look-back: it starts by what it reads, as the others do by the width of the model."""
        super()._init_weights(module)
        if module is self.head:
            nn.init.normal_(self.head.weight, std=linear_start(self.head.in_features))

    @property
    def cache_rows(self) -> int:  # type: ignore[override]
        """Rows of a cache that a row of the batch takes: a channel that is read by itself has its own memory."""
        return 1 if self.config.channel_mixing else self.config.num_input_channels

    def forward(
        self,
        past_values: Tensor,
        future_values: Tensor | None = None,
        cache: TitansCache | None = None,
        begins: Tensor | None = None,
    ) -> TitansForPredictionOutput:
        """Forecasts, and the loss if the truth is given.

        Args:
            past_values: [B, look-back, channels].
            future_values: [B, horizon, channels].
            cache: memory of the rows before the look-back, which it learns, too: it is updated in place.
            begins: [B], true where a row does not go on from ``cache`` but begins anew.

        Raises:
            ValueError: other sizes than the configuration's, NaN or infinity in ``past_values``.
        """
        outputs, quantiles, loss = self.outputs(past_values, cache, begins), self.config.quantiles, None
        if quantiles is None:
            forecast = outputs.squeeze(-1)
            if future_values is not None:
                loss = F.mse_loss(forecast, future_values)
            return TitansForPredictionOutput(loss=loss, prediction_outputs=forecast)
        outputs = outputs.sort(-1).values  # quantiles do not cross
        if future_values is not None:
            loss = pinball(outputs, future_values, quantiles).mean()
        median = outputs[..., quantiles.index(0.5)]
        return TitansForPredictionOutput(loss=loss, prediction_outputs=median, quantile_outputs=outputs)

    @torch.no_grad()
    def update(self, new_rows: Tensor, stream: TitansStream | None = None) -> TitansStream:
        """Goes on with series whose rows come bit by bit, at constant size; rows cut anywhere give the same stream.

        Args:
            new_rows: [B, any number, channels].
            stream: what an earlier call returned, which stays as it is; None begins a stream.

        Raises:
            ValueError: another number of channels or series, NaN or infinity in ``new_rows``.
        """
        length, new_rows = self.config.context_length, new_rows.to(self.device, self.dtype)
        self._check_new(new_rows, stream)
        cache = self._start(len(new_rows)) if stream is None else stream.cache.copy()
        rows = new_rows if stream is None else torch.cat([stream.rows, new_rows], 1)
        while rows.shape[1] >= 2 * length:
            self.outputs(rows[:, :length], cache)
            rows = rows[:, length:]
        return TitansStream(cache, rows.clone())  # a view would keep all of them

    @torch.no_grad()
    def forecast(self, stream: TitansStream) -> TitansForPredictionOutput:
        """The rows after the last one of a stream, which stays as it is.

        Raises:
            ValueError: the stream holds fewer than ``context_length`` rows.
        """
        seen, length = stream.rows.shape[1], self.config.context_length
        if seen < length:
            raise ValueError(
                f"the stream holds {seen} rows, context_length={length}; update it with {length - seen} more first"
            )
        return self(stream.rows[:, -length:], cache=stream.cache.copy())

    def _start(self, batch: int) -> TitansCache:
        """The memory before the first block."""
        cache = TitansCache(self.config.num_hidden_layers)
        for layer, block in zip(cache.layers, self.model.layers, strict=True):
            layer.update(block.initial_state(batch * self.cache_rows), 0)  # type: ignore[operator]
        return cache

    def outputs(self, past_values: Tensor, cache: TitansCache | None = None, begins: Tensor | None = None) -> Tensor:
        """What the head gives, in the series' own units and any order: [B, horizon, channels, outputs per step]."""
        self._check_values(past_values)
        mean, scale = past_values.mean(1, keepdim=True), past_values.std(1, keepdim=True, unbiased=False)
        scale = scale.where(scale > 0, 1)  # a channel that does not move
        outputs = self._forecast((past_values - mean) / scale, cache, begins)
        return outputs * scale.unsqueeze(-1) + mean.unsqueeze(-1)

    def _forecast(self, x: Tensor, cache: TitansCache | None, begins: Tensor | None) -> Tensor:
        """Normalised rows [B, look-back, channels] -> [B, horizon, channels, outputs per step]."""
        P, S, mixing = self.config.patch_length, self.config.patch_stride, self.config.channel_mixing
        patches = x[:, (x.shape[1] - P) % S :].unfold(1, P, S)  # [B, N, channels, P]
        tokens = patches.flatten(2) if mixing else patches.transpose(1, 2).flatten(0, 1)
        begins = None if begins is None else begins.repeat_interleave(self.cache_rows)
        read = self.model(inputs_embeds=self.dropout(self.in_proj(tokens)), cache=cache, use_cache=False, begins=begins)
        tokens = tokens + self.dropout(self.out_proj(read.last_hidden_state))
        patches = tokens.unflatten(2, (-1, P)).transpose(1, 2) if mixing else tokens.unflatten(0, (len(x), -1))
        outputs = self.head(patches.flatten(2))  # from [B, channels, N, P]
        return outputs.unflatten(2, (self.config.prediction_length, -1)).transpose(1, 2)

    def _check_values(self, x: Tensor) -> None:
        expected = (self.config.context_length, self.config.num_input_channels)
        if x.ndim != 3 or x.shape[1:] != expected:
            raise ValueError(
                f"past_values has the shape {list(x.shape)}; give [batch, context_length, num_input_channels], here "
                f"[batch, {expected[0]}, {expected[1]}], or build a model of other lengths"
            )
        _check_finite("past_values", x)

    def _check_new(self, x: Tensor, stream: TitansStream | None) -> None:
        channels = self.config.num_input_channels
        if x.ndim != 3 or x.shape[2] != channels:
            raise ValueError(
                f"new_rows has the shape {list(x.shape)}; give [batch, rows, num_input_channels], here [batch, rows, "
                f"{channels}]"
            )
        if stream is not None and len(x) != len(stream.rows):
            raise ValueError(
                f"new_rows holds {len(x)} series, the stream {len(stream.rows)}; give rows of all of them, or begin "
                "another stream"
            )
        _check_finite("new_rows", x)


def _check_finite(name: str, x: Tensor) -> None:
    finite = x.isfinite()
    if not finite.all():
        window, row, channel = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {x[window, row, channel].item()}, first in window {window}, row {row}, channel {channel}; "
            "fill gaps before forecasting"
        )


AutoConfig.register("titans_prediction", TitansPredictionConfig)
AutoModelForTimeSeriesPrediction.register(TitansPredictionConfig, TitansForPrediction)
