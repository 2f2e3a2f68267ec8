"""Train a small byte-level MAC for half a minute, load it as any Hugging Face model, and let it write.

The command line does the same: `titans train`, then `titans generate RUN --prompt "def "`.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import titans.models  # noqa: F401  registers Titans with the Auto classes
from titans.tasks import get_task
from titans.training.config import parse_config
from titans.training.run import train


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = get_task("language")
    with tempfile.TemporaryDirectory() as run:
        config = parse_config(
            task,
            {
                "output": run,  # keep this folder to keep the model
                "model": {"variant": "mac", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
                "training": {"length": 256, "batch_size": 8, "tokens": 1e5, "learning_rate": 4e-3},
                "data": {"validation_bytes": 10_000},  # no `train`: the source of Python's standard library
            },
        )
        result = train(config, task, evaluate=False)
        print(f"validation loss {result['validation_loss']:.2f} nats a byte")

        model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
        prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
        torch.manual_seed(0)
        written = model.generate(**prompt, max_new_tokens=100, do_sample=True, temperature=0.7)
        print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
