"""titans prepare"""

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans prepare books.jsonl.xz -o books.tokens
  titans prepare texts/ -o texts.tokens --tokenizer gpt2_folder
  titans train --data books.tokens --data.validation val.txt --data.test test.txt
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans prepare",
        description="Tokenizes texts of any size once, at constant memory, into a folder to train from that is never "
        "loaded whole. The folder is there when it is complete: after an interruption the command begins anew.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("data", type=str, help="text file, folder, .jsonl, FASTA (also .gz, .xz) or data set")
    parser.add_argument("-o", "--output", type=str, required=True, help="folder to make")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="'bytes', 'nucleotide', or a folder with a tokenizer; by default nucleotide for a FASTA file, else bytes",
    )
    parser.add_argument("--text-field", type=str, default="text", help="field of lines and rows that holds the text")
    options = parse(parser, arguments)

    quiet_libraries()
    from titans.training.config import TextData
    from titans.training.prepared import prepare
    from titans.training.tokens import tokenizer_of

    tokenizer = tokenizer_of(TextData(train=options.data, tokenizer=options.tokenizer))
    counts = prepare(options.data, options.output, tokenizer, text_field=options.text_field)
    sizes = f"{counts.documents:,} documents, {counts.bytes:,} bytes of text, {counts.tokens:,} tokens"
    print(f"{options.output}: {sizes}")
