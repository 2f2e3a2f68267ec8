"""titans memorize"""

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans memorize runs/mine book.txt -o book.memory.safetensors
  titans memorize runs/mine one.txt two.txt.gz many.jsonl.xz -o all.memory.safetensors
  titans generate runs/mine --memory book.memory.safetensors --prompt "Call me"
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans memorize",
        description="Reads documents of any size into a trained model's memory and keeps it in a file. After an "
        "interruption the same command goes on where the memory was last saved, to the same file bit for bit.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train` leaves it")
    parser.add_argument(
        "files", type=str, nargs="+", help="text, .jsonl or FASTA files (also .gz, .xz), read in this order"
    )
    parser.add_argument("-o", "--output", type=str, required=True, help="the memory's file")
    parser.add_argument("--text-field", type=str, default="text", help="field of .jsonl lines that holds the text")
    parser.add_argument("--save-every", type=int, default=100_000, help="tokens between two savings of what is read")
    options = parse(parser, arguments)

    quiet_libraries()
    from titans.training.memorize import memorize
    from titans.training.models import load_text_run

    model, tokenizer = load_text_run(options.run)
    choices = {name: options[name] for name in ("text_field", "save_every")}
    reading = memorize(model, tokenizer, options.files, options.output, **choices)
    print(f"{options.output}: {reading.tokens:,} tokens read, {reading.surprise:.3f} bits a token")
