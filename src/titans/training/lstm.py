"""The LSTM of torch as a language model: a baseline whose state is no memory of tokens."""

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

State = tuple[Tensor, Tensor]  # h and c, [num_hidden_layers, B, hidden_size] each


class LSTMConfig(PreTrainedConfig):
    """An LSTM behind an embedding.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the embedding and of every layer.
        num_hidden_layers: layers.
        initializer_range: standard deviation of the embedding at the start; torch starts the layers.
        tie_word_embeddings: use the embedding as the output map, too.
        use_cache: return the state; off by default, as ``generate`` cannot drive it: it reads the whole text again.
    """

    model_type = "lstm"

    vocab_size: int = 258
    hidden_size: int = 248
    num_hidden_layers: int = 2
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class LSTMModel(PreTrainedModel):
    """Token ids to hidden states."""

    config_class = LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.post_init()

    def forward(
        self, input_ids: Tensor, cache: State | None = None, use_cache: bool | None = None, **_: object
    ) -> BaseModelOutputWithPast:
        """Ids [B, T], going on from ``cache`` if given, -> [B, T, hidden_size]; padding only on the right."""
        hidden, state = self.lstm(self.embed_tokens(input_ids), cache)
        keep = self.config.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=state if keep else None)  # type: ignore[arg-type]


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """The model and its output map."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        cache: State | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], of the last ``logits_to_keep`` tokens if above 0, and the loss of ``labels``."""
        out = self.model(input_ids, cache, use_cache)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss: Tensor | None = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache)  # type: ignore[arg-type]


AutoConfig.register("lstm", LSTMConfig)
AutoModel.register(LSTMConfig, LSTMModel)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)
