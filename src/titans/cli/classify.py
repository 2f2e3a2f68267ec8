"""titans classify"""

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans classify runs/tata genes.fa -o calls.csv
  titans classify runs/tata genes.csv.gz -o calls.csv
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans classify",
        description="Says for every sequence of a file which class it belongs to, by a model of `titans train --task "
        "dna`. Written is a line a sequence: its id, the likeliest label, the probability of every class. A model "
        "trained on both strands reads both and takes the mean.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train --task dna` leaves it")
    parser.add_argument("file", type=str, help="FASTA (.fa, .fasta, .fna) or CSV file, also .gz, .xz, of any size")
    parser.add_argument("-o", "--output", type=str, required=True, help="CSV file for the classes")
    options = parse(parser, arguments)

    quiet_libraries()
    from titans.training.classify import classify_run

    count = classify_run(options.run, options.file, options.output)
    print(f"{options.output}: the classes of {count:,} sequences")
