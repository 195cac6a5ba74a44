"""INT-FlashAttention's tables, and answers to the questions that it leaves open: rows as JSON, tables, pictures.

python benchmarks/paper                       # every study at its full size
python benchmarks/paper errors speed          # some
python benchmarks/paper errors --small --results /tmp/out --figures /tmp/out
python benchmarks/paper --draw                # tables and pictures of what earlier runs found
"""

import argparse
from pathlib import Path

import errors
import speed
import study

STUDIES = {each.__name__: each for each in (errors, speed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all if left out")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is kept")
    parser.add_argument("--results", type=Path, default=study.RESULTS, help="folder of the rows")
    parser.add_argument("--figures", type=Path, default=study.FIGURES, help="folder of the pictures")
    asked = parser.parse_args()
    if unknown := set(asked.studies) - set(STUDIES):
        parser.error(f"{', '.join(sorted(unknown))}: no such study; there are {', '.join(STUDIES)}")
    for folder in (asked.results, asked.figures):
        folder.mkdir(parents=True, exist_ok=True)
    for name in asked.studies or STUDIES:
        each = STUDIES[name]
        print(f"\n## {name}\n\n{each.__doc__}")
        if asked.draw:
            rows = study.read(each, asked.results)
            study.picture(each, rows, asked.figures)
            print(each.table(rows))
        else:
            print(study.run(each, asked.small, asked.results, asked.figures), flush=True)


if __name__ == "__main__":
    main()
