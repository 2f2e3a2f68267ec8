"""Titans as a classifier of sequences: blocks, the mean over a sequence's tokens, one linear map."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from titans.memory.pieces import check_mask
from titans.models.causal_lm import TitansModel, TitansPreTrainedModel
from titans.models.configuration import TitansConfig


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over each row's real tokens: [B, T, D] and mask [B, T], zero at padding (None: no padding) -> [B, D].

    Raises:
        ValueError: a row without a real token, or a mask of another shape.
    """
    mask = check_mask(mask, *hidden.shape[:2])
    if mask is None:
        return hidden.mean(1)
    counts = mask.sum(1, keepdim=True)
    if not counts.all():
        row = int((counts == 0).nonzero()[0, 0])
        raise ValueError(f"row {row} of attention_mask has no token; leave empty sequences out")
    return hidden.masked_fill(~mask.unsqueeze(2), 0).sum(1) / counts


class TitansForSequenceClassification(TitansPreTrainedModel):
    """A Titans classifier of whole sequences: DNA (section 5 of arXiv 2501.00663), text, any tokens.

    The classes are ``config.num_labels``, or ``config.id2label`` if they have names. Every token's output counts
    alike, not the last one's alone, whose memory has forgotten what stood at the beginning.
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        if config.memory_write_price:
            raise ValueError(f"memory_write_price={config.memory_write_price} is for language models; leave it at 0")
        self.model = TitansModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> SequenceClassifierOutput:
        """Logits [B, num_labels], and the loss if ``labels`` are given.

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, hidden_size].
            attention_mask: [B, T], zero at padding, on either side; padding changes nothing. None: no padding.
            labels: classes [B], integers; numbers [B] where ``num_labels`` is 1; or as ``config.problem_type`` says.

        Raises:
            ValueError: a row that is padding alone.
        """
        out = self.model(
            input_ids, attention_mask, None, inputs_embeds, use_cache=False, output_hidden_states=output_hidden_states
        )
        logits = self.score(mean_of_tokens(out.last_hidden_state, attention_mask))
        loss: Any = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


AutoModelForSequenceClassification.register(TitansConfig, TitansForSequenceClassification)
