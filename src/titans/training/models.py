"""Models by a short description: ours and the library baselines, under one interface."""

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from titans.models.configuration import linear_start
from titans.training.config import check_settings, nearest, refusals, require

# type -> (module, config class, model class, defaults that make a model of about a million parameters). The embeddings
# are tied in all of them.
_BASELINES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": (
        "transformers.models.llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 128, "intermediate_size": 360, "num_hidden_layers": 5, "num_attention_heads": 4},
    ),
    "sliding_llama": (
        "transformers.models.mistral",
        "MistralConfig",
        "MistralForCausalLM",
        {"hidden_size": 128, "intermediate_size": 360, "num_hidden_layers": 5, "num_attention_heads": 4,
         "sliding_window": 64},
    ),
    "mamba2": (
        "transformers.models.mamba2",
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 9, "head_dim": 64, "state_size": 48, "n_groups": 1, "chunk_size": 64},
    ),
    "gated_delta_net": (
        "transformers.models.qwen3_5",
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {"hidden_size": 128, "intermediate_size": 248, "num_hidden_layers": 5,
         "linear_num_key_heads": 2, "linear_num_value_heads": 2,
         "linear_key_head_dim": 64, "linear_value_head_dim": 96},
    ),
    # the gated delta net whose factors reach from -1 to 1; the library wants at least one layer of attention
    "olmo_hybrid": (
        "transformers.models.olmo_hybrid",
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {"hidden_size": 128, "intermediate_size": 268, "num_hidden_layers": 5, "num_attention_heads": 2,
         "linear_key_head_dim": 64, "linear_value_head_dim": 96},
    ),
    "lstm": ("titans.training.lstm", "LSTMConfig", "LSTMForCausalLM", {}),
}  # fmt: skip
MODEL_TYPES = ("titans", *_BASELINES)


def build_model(
    spec: dict[str, Any], *, vocab_size: int, eos_token_id: int, pad_token_id: int, seed: int = 0
) -> PreTrainedModel:
    """A freshly initialised causal language model.

    Args:
        spec: `{"type": one of MODEL_TYPES (default "titans"), **fields of that model's configuration}`.
        vocab_size: number of token ids.
        eos_token_id: ends a text, and begins one.
        pad_token_id: fills batches up.
        seed: of the random initialisation.

    Raises:
        ValueError: an unknown type or key (the message names the nearest valid one), or a value the model refuses.
    """
    fields = dict(spec)
    kind = fields.pop("type", "titans")
    fields |= token_settings(vocab_size, eos_token_id, pad_token_id)
    set_seed(seed)
    if kind == "titans":
        from titans.models import TitansConfig, TitansForCausalLM

        return TitansForCausalLM(TitansConfig(**fields))
    if kind not in _BASELINES:
        raise ValueError(f"model.type={kind!r} is unknown; use {nearest(kind, MODEL_TYPES)}")
    config = baseline_config(kind, fields)
    module_name, _, model_name, _ = _BASELINES[kind]
    model_class = getattr(importlib.import_module(module_name), model_name)
    with refusals(spec, type(config).__name__):
        return slow_forgetting(kind, model_class(config))


def token_settings(vocab_size: int, eos_token_id: int, pad_token_id: int) -> dict[str, int]:
    """What every configuration says of token ids: the id that ends a text also begins one."""
    return {
        "vocab_size": vocab_size,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def baseline_config(kind: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """A baseline's configuration: `fields`, which are checked, and our defaults beneath them."""
    module_name, config_name, _, defaults = _BASELINES[kind]
    config_class = getattr(importlib.import_module(module_name), config_name)
    check_settings(kind, fields, set(config_class.__annotations__) - {"layer_types"})
    with refusals(fields, config_name):
        config = config_class(**_derived(kind, {"tie_word_embeddings": True, **defaults, **fields}))
    return config if kind == "mamba2" else started(config, fields)  # whose authors' start is wide at any width


def started(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with our start of linear maps, unless `fields` have one; the libraries' is for wide models."""
    if "initializer_range" not in fields:
        config.initializer_range = linear_start(config.hidden_size)
    return config


def slow_forgetting(kind: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model; a gated delta net with steps of forgetting as small as its authors' at the start (arXiv 2412.06464).

    They lie between 0.001 and 0.1, here spread evenly over the heads on a logarithmic scale. The library's, 1.3, is for
    weights that are loaded: it leaves a state e^-10 of itself after one token.
    """
    if kind == "gated_delta_net":
        for name, bias in model.named_parameters():
            if name.endswith("dt_bias"):
                step = 0.001 * 100 ** ((torch.arange(len(bias)) + 0.5) / len(bias))
                bias.data = step.expm1().log()  # softplus makes the step of it
    return model


def _derived(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The settings that follow from the others."""
    if kind == "mamba2":
        inner = fields["hidden_size"] * fields.get("expand", 2)
        return {"num_heads": inner // fields["head_dim"], **fields}
    if kind == "gated_delta_net":
        # Every layer linear; the library's cache of such a model cannot drive generate(), so it is off by default.
        return {"layer_types": ["linear_attention"] * fields["num_hidden_layers"], "use_cache": False, **fields}
    if kind in ("olmo_hybrid", "lstm"):
        return fields
    return {"num_key_value_heads": fields["num_attention_heads"], "max_position_embeddings": 2**20, **fields}


def has_constant_state(model: PreTrainedModel) -> bool:
    """Whether what the model carries from token to token stays of one size however long the text."""
    return model.config.model_type not in ("llama", "olmo_hybrid")


def read_on(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Any = None, last: bool = False
) -> tuple[torch.Tensor, Any]:
    """Reads `input_ids` [B, T] where `cache` left off: logits [B, T, vocab] and the cache to go on with.

    `cache=None` begins anew; `last=True` gives the last token's logits alone, [B, 1, vocab].
    """
    extra: dict[str, Any] = {"logits_to_keep": 1} if last else {}
    if model.config.model_type == "qwen3_5_text":
        # Without an attention layer the library cannot ask its cache for the length; nothing here needs it.
        no_mask = {"full_attention": None, "linear_attention": None}
        extra |= {"attention_mask": no_mask, "position_ids": torch.zeros_like(input_ids)}
    output = model(input_ids=input_ids, cache=cache, use_cache=True, **extra)
    return output.logits, output.cache


def is_classifier(architecture: str) -> bool:
    """Whether a model class of that name gives classes of whole sequences, by the library's own rule of names."""
    return architecture.endswith("ForSequenceClassification")


def load_run(run: str) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the GPU if there is one) and tokenizer (None: it has none) of a finished run.

    Raises:
        FileNotFoundError: no run there, or one that has not finished.
        ImportError: the model needs a package that is not installed.
        ValueError: the checkpoint cannot be read, or a classifier's tokenizer is missing.
    """
    import titans.training.classifiers
    import titans.training.forecasters
    import titans.training.lstm  # noqa: F401  registers, as those two, what is not a library's own with the Auto classes

    folder = Path(run)
    weights = folder / "model.safetensors"
    if not weights.exists():
        unfinished = "; the run has not finished, resume it first" if (folder / "checkpoints").exists() else ""
        raise FileNotFoundError(f"run={run!r} holds no model.safetensors{unfinished or '; give the folder of a run'}")
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) in MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING:
            auto: Any = AutoModelForTimeSeriesPrediction
        elif is_classifier(config.architectures[0]):
            auto = AutoModelForSequenceClassification
        else:
            auto = AutoModelForCausalLM
        model: Any = auto.from_pretrained(folder, local_files_only=True)
    except ImportError:
        raise  # a model of another package, which names it
    except Exception as error:  # safetensors, json and torch each raise their own
        raise ValueError(f"{weights} cannot be read ({error}); it is damaged, train again or restore it") from error
    if torch.cuda.is_available():
        model.cuda()
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    files = "the whole folder of the run, with its tokenizer.json and tokenizer_config.json"
    require(has_tokenizer or auto is not AutoModelForSequenceClassification, "tokenizer", tokenizer, files)
    return model.eval(), tokenizer


def load_text_run(run: str) -> tuple[Any, Any]:
    """``load_run`` for what needs a language model and its tokenizer: also a ValueError where they are none."""
    model, tokenizer = load_run(run)
    check_text_run(run, model, tokenizer)
    return model, tokenizer


def check_text_run(run: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raises ValueError where a run's model reads no text, or writes none."""
    if tokenizer is None:
        raise ValueError(
            f"run={run!r} has no tokenizer: its model reads no text, or its tokenizer's files were left behind; "
            "give the whole folder of a run trained on text"
        )
    if not model.can_generate():
        raise ValueError(f"run={run!r} holds a {type(model).__name__}, which writes no text; give a language model")
