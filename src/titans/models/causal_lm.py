"""Titans as Hugging Face models: embed, blocks, norm, head."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from titans.layers import LMM, MAC, MAG, MAL, NeuralMemory
from titans.layers.block import Block
from titans.layers.neural_memory import GateProjection, writes
from titans.memory.pieces import check_mask
from titans.models.cache import TitansCache
from titans.models.configuration import TitansConfig


def build_block(config: TitansConfig) -> Block:
    """One block of the configured variant."""
    heads: int = config.num_memory_heads  # type: ignore[assignment]  # filled in by the configuration
    hidden: int = config.intermediate_size  # type: ignore[assignment]
    memory = NeuralMemory(
        config.hidden_size,
        heads=heads,
        key_heads=config.num_memory_key_heads,
        head_dim=config.memory_head_dim,
        chunk_size=config.chunk_size,
        network=config.memory_network,
        gate=config.memory_gate,
        max_lr=config.memory_max_lr,
        forget=config.memory_forget,
        max_momentum=config.memory_max_momentum,
        skip=config.memory_skip,
        conv_size=config.memory_conv_size,
    )
    if config.variant == "lmm":
        return LMM(memory, intermediate_size=hidden)
    attention = {
        "num_attention_heads": config.num_attention_heads,
        "num_persistent_tokens": config.num_persistent_tokens,
    }
    if config.variant == "mac":
        return MAC(memory, **attention, segment_length=config.segment_length, intermediate_size=hidden)
    block = {"mag": MAG, "mal": MAL}[config.variant]
    return block(memory, **attention, sliding_window=config.sliding_window, intermediate_size=hidden)


PIECE = 2048  # tokens read at once where any number is to be read


class TitansPreTrainedModel(PreTrainedModel):
    """What Titans models share: initialisation, checkpointing, cache."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a memory cannot un-read a token: no assisted generation
    _supports_sdpa = True
    cache_rows = 1  # of a row of the batch

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GateProjection):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class TitansModel(TitansPreTrainedModel):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([build_block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6, bias=False)
        self.gradient_checkpointing = False
        self._no_split_modules = [type(self.layers[0]).__name__]  # a block's weights travel together
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as every model of transformers
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        begins: Tensor | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Reads tokens, going on from ``cache`` if given.

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, hidden_size].
            attention_mask: [B, T] or [B, past + T], zero at padding; padding changes nothing.
            cache: cache of an earlier call; it is updated in place. None starts from the empty memory.
            use_cache: return a cache; default ``config.use_cache`` outside of training.
            begins: [B], true where a row does not go on from ``cache`` but begins anew.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3:
            shape = list(x.shape[:-1] if inputs_embeds is None else x.shape)
            raise ValueError(f"give input_ids [B, T] or inputs_embeds [B, T, hidden_size], not {shape}")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = TitansCache(self.config.num_hidden_layers)
        mask = None if attention_mask is None else check_mask(attention_mask[:, -x.shape[1] :], *x.shape[:2])
        hidden_states = []
        for i, block in enumerate(self.layers):
            hidden_states.append(x)
            layer: Any = None if cache is None else cache.layers[i]
            single = mask is None and begins is None and x.shape[1] == 1
            stepped = layer.step(block, x) if layer is not None and single else None
            if stepped is not None:
                x = stepped
                continue
            state = None if layer is None else layer.state
            if self.gradient_checkpointing and self.training:
                x, state = self._gradient_checkpointing_func(block.__call__, x, state, mask, begins)
            else:
                x, state = block(x, state, mask, begins)
            if layer is not None:
                layer.update(state, x.shape[1])
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            cache=cache,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,  # type: ignore[arg-type]
        )


@contextmanager
def gates_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills with what the gates' projections of all memories give within the context."""
    found: list[Tensor] = []

    def keep(_, __, z: Tensor) -> None:
        found.append(z)  # nothing is worked out here: activation checkpointing would miss it

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, GateProjection)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """A Titans language model; ``generate`` works as for every Hugging Face model, at constant memory."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):  # type: ignore[override]
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = TitansCache(self.config.num_hidden_layers)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as every model of transformers
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        begins: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] of the next token, and the loss if ``labels`` [B, T] (-100: ignored) are given.

        In training the loss holds the price of writing, if the configuration sets one.
        ``logits_to_keep`` > 0: logits of that many last tokens only. Everything else as ``TitansModel``.
        """
        price = self.config.memory_write_price if self.training and labels is not None else 0.0
        with gates_of(self.model) if price else nullcontext([]) as gates:
            out = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, begins)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if price:
                # The Trainer adds the losses of accumulated batches up: each pays by its share of their targets
                items = kwargs.get("num_items_in_batch")
                share = 1.0 if items is None else (labels[:, 1:] != -100).sum() / items
                loss = loss + price * share * torch.cat([writes(z).flatten() for z in gates]).mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states)

    @torch.no_grad()
    def memorize(self, input_ids: Tensor, cache: TitansCache | None = None) -> TitansCache:
        """Reads ids [B, T] of any length, on any device, piece by piece at constant memory; no logits are worked out.

        Args:
            cache: goes on from it, updated in place; None starts from the empty memory.

        Returns:
            The cache, which counts columns anew: ``generate(prompt, cache=cache)`` takes what follows, and not again
            what was memorized. ``cache.save_pretrained(path, model)`` keeps it.
        """
        cache = TitansCache(self.config.num_hidden_layers) if cache is None else cache
        for piece in input_ids.split(PIECE, -1):
            self.model(piece.to(self.device), cache=cache, use_cache=True)
        return cache.rebase()


AutoConfig.register("titans", TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)
