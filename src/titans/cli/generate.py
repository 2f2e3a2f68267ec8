"""titans generate"""

import sys
from pathlib import Path

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans generate runs/mine --prompt "Call me"
  titans generate runs/mine --prompt-file long.txt --max-new-tokens 500 --temperature 0.8 --top-p 0.95
  cat long.txt | titans generate runs/mine --prompt-file -
  titans generate runs/mine --memory book.memory.safetensors --prompt "And then"
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans generate",
        description="Lets a trained model go on from a prompt, printing as it writes. A prompt may be of any length: "
        "what a Titans model carries from token to token stays of one size.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train` leaves it")
    parser.add_argument("--prompt", type=str, default="", help="text to go on from")
    parser.add_argument("--prompt-file", type=str | None, default=None, help="read the prompt from a file; - is stdin")
    parser.add_argument("--memory", type=str | None, default=None, help="go on from a file of `titans memorize`")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens alone; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parse(parser, arguments)

    quiet_libraries()
    import torch
    from transformers import TextStreamer, set_seed

    from titans.models import TitansCache
    from titans.training.models import load_text_run
    from titans.training.tokens import prompt_ids

    model, tokenizer = load_text_run(options.run)
    memory = {"cache": TitansCache.load(options.memory, model)} if options.memory else {}
    ids = prompt_ids(tokenizer, _prompt(options.prompt, options.prompt_file)).to(model.device)
    sampling: dict = {"do_sample": False}
    if options.temperature > 0:
        draws = {name: options[name] for name in ("temperature", "top_k", "top_p")}
        sampling = {"do_sample": True, **draws}
    set_seed(options.seed)
    with torch.inference_mode():
        model.generate(
            ids,
            **memory,
            max_new_tokens=options.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )


def _prompt(text: str, path: str | None) -> str:
    if path is None:
        return text
    if text:
        raise ValueError("--prompt and --prompt-file are both given; use one")
    return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
