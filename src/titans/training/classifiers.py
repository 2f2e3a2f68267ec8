"""Classifiers of sequences by a short description: ours, and the baselines, which differ in the backbone alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from titans.memory.pieces import align, check_mask, take
from titans.models import TitansConfig, TitansForSequenceClassification
from titans.models.classification import mean_of_tokens
from titans.training.config import check_settings, nearest, refusals, require
from titans.training.models import MODEL_TYPES, baseline_config, slow_forgetting, started, token_settings


class ConvolutionsConfig(PreTrainedConfig):
    """Convolutional blocks.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the embedding and of every block.
        num_hidden_layers: blocks; each halves the length.
        kernel_size: tokens that a convolution sees.
        initializer_range: standard deviation of embedding and convolutions at the start.
    """

    model_type = "convolutions"

    vocab_size: int = 7
    hidden_size: int = 64
    num_hidden_layers: int = 3
    kernel_size: int = 8
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class Convolutions(PreTrainedModel):
    """The blocks of the CNN of GenomicsBenchmarks (Gresova et al. 2023), of one width.

    Each is a convolution, batch norm, ReLU and the maximum of two tokens; the norm counts real tokens alone.
    """

    config_class = ConvolutionsConfig

    def __init__(self, config: ConvolutionsConfig):
        super().__init__(config)
        self.config: ConvolutionsConfig = config
        D, layers = config.hidden_size, range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.convolutions = nn.ModuleList([nn.Conv1d(D, D, config.kernel_size) for _ in layers])
        self.norms = nn.ModuleList([nn.BatchNorm1d(D) for _ in layers])
        self.stride = 2**config.num_hidden_layers
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> BaseModelOutput:
        """Ids [B, T] and a mask of padding on the right [B, T] -> [B, T / stride (rounded up), hidden_size]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask, x, beyond = mask.bool(), self.embed_tokens(input_ids), self.config.kernel_size - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x.masked_fill(~mask.unsqueeze(2), 0)  # as beyond the ends
            y = convolution(F.pad(x.mT, (beyond // 2, beyond - beyond // 2))).mT
            x = torch.zeros_like(y)
            x[mask] = F.relu(norm(y[mask]))
            x, mask = F.max_pool1d(x.mT, 2, ceil_mode=True).mT, mask[:, ::2]
        return BaseModelOutput(last_hidden_state=x)  # type: ignore[arg-type]


class BackboneClassifierConfig(PreTrainedConfig):
    """A classifier on top of any model of transformers that gives hidden states.

    Args:
        backbone: that model's configuration, or the dictionary of it.
    """

    model_type = "backbone_classifier"
    sub_configs = {"backbone": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    backbone: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.backbone, dict):
            self.backbone = AutoConfig.for_model(**self.backbone)
        super().__post_init__(**kwargs)


class BackboneForSequenceClassification(PreTrainedModel):
    """A backbone with the head of ``TitansForSequenceClassification``: the mean over real tokens, one linear map.

    Padding may stand anywhere: rows are moved to the left before the backbone reads them.
    """

    config_class = BackboneClassifierConfig
    base_model_prefix = "backbone"

    def __init__(self, config: BackboneClassifierConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone)
        self.score = nn.Linear(self.backbone.config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: object
    ) -> SequenceClassifierOutput:
        """Ids [B, T], their mask [B, T] -> logits [B, num_labels], and the loss if ``labels`` [B] are given."""
        mask = None if attention_mask is None else check_mask(attention_mask, *input_ids.shape)
        if mask is not None:
            index = align(mask)[0]
            input_ids, mask = take(input_ids, index), take(mask, index)
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        stride = getattr(self.backbone, "stride", 1)
        logits = self.score(mean_of_tokens(hidden, None if mask is None else mask[:, ::stride]))
        loss: Any = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("convolutions", ConvolutionsConfig)
AutoModel.register(ConvolutionsConfig, Convolutions)
AutoConfig.register("backbone_classifier", BackboneClassifierConfig)
AutoModelForSequenceClassification.register(BackboneClassifierConfig, BackboneForSequenceClassification)

# Both directions at once; every layer of the Transformer sees all tokens, and its feed-forward part is gated.
_ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformer": (
        ModernBertConfig,
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "global_attn_every_n_layers": 1, "cls_token_id": None, "sep_token_id": None},
    ),
    "cnn": (ConvolutionsConfig, {}),
}  # fmt: skip
CLASSIFIER_TYPES = (*MODEL_TYPES, *_ENCODERS)


def build_classifier(
    spec: dict[str, Any], *, classes: list[str], vocab_size: int, eos_token_id: int, pad_token_id: int, seed: int = 0
) -> PreTrainedModel:
    """A freshly initialised classifier of token ids [B, T] with ``attention_mask``.

    Args:
        spec: `{"type": one of CLASSIFIER_TYPES (default "titans"), **fields of that model's configuration}`.
        classes: their labels.
        vocab_size, eos_token_id, pad_token_id, seed: as in `build_model`.

    Raises:
        ValueError: an unknown type or key (the message names the nearest valid one), or a value the model refuses.
    """
    fields = dict(spec)
    kind = fields.pop("type", "titans")
    require(kind in CLASSIFIER_TYPES, "model.type", kind, nearest(kind, CLASSIFIER_TYPES))
    fields |= token_settings(vocab_size, eos_token_id, pad_token_id)
    named: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: number for number, label in enumerate(classes)},
    }
    set_seed(seed)
    if kind == "titans":
        return TitansForSequenceClassification(TitansConfig(**fields, **named))
    backbone = _encoder_config(kind, fields) if kind in _ENCODERS else baseline_config(kind, fields)
    with refusals(spec, type(backbone).__name__):
        model = BackboneForSequenceClassification(BackboneClassifierConfig(backbone=backbone, **named))
    return slow_forgetting(kind, model)


def _encoder_config(kind: str, fields: dict[str, Any]) -> PreTrainedConfig:
    config_class, defaults = _ENCODERS[kind]
    check_settings(kind, fields, config_class.__dataclass_fields__)
    with refusals(fields, config_class.__name__):
        return started(config_class(**defaults | fields), fields)
