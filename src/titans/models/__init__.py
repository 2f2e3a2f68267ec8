"""Hugging Face models over the layers; importing this registers them with the Auto classes."""

from titans.models.cache import TitansCache
from titans.models.causal_lm import TitansForCausalLM, TitansModel, TitansPreTrainedModel
from titans.models.classification import TitansForSequenceClassification
from titans.models.configuration import (
    TitansConfig,
    titans_170m,
    titans_340m,
    titans_400m,
    titans_760m,
    titans_tiny,
)
from titans.models.prediction import TitansForPrediction, TitansForPredictionOutput, TitansPredictionConfig
from titans.models.stream import TitansStream

__all__ = [
    "TitansCache", "TitansConfig", "TitansForCausalLM", "TitansForPrediction", "TitansForPredictionOutput",
    "TitansForSequenceClassification", "TitansModel", "TitansPreTrainedModel", "TitansPredictionConfig",
    "TitansStream", "titans_170m", "titans_340m", "titans_400m", "titans_760m", "titans_tiny",
]  # fmt: skip
