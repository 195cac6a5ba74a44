"""INT-FlashAttention's tables, and answers to the questions that it leaves open: rows as JSON, tables, pictures.

    python benchmarks/paper                       # every study at its full size
    python benchmarks/paper errors speed          # some
    python benchmarks/paper errors --small --results out --figures out
    python benchmarks/paper --draw                # tables and pictures of what earlier runs found

Rows go to benchmarks/results, pictures to docs/evidence, if no other folders are named.
"""

import argparse
from importlib import import_module
from pathlib import Path

import study

STUDIES = (
    *("errors", "speed", "values", "probabilities", "pv_costs", "length", "depth", "size"),
    *("int4", "peaked", "windows", "transforms", "transform_cost", "presets"),
)


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{folder}: {error.strerror}")
    for name in asked.studies or STUDIES:
        each = import_module(name)
        if asked.draw and not study.kept(each, asked.results).exists():
            parser.error(f"{study.kept(each, asked.results)}: not there; without --draw the study is run")
        print(f"\n## {name}\n\n{each.__doc__}")
        if asked.draw:
            rows = study.read(each, asked.results)
            study.picture(each, rows, asked.figures)
            print(each.table(rows))
        else:
            print(study.run(each, asked.small, asked.results, asked.figures), flush=True)


if __name__ == "__main__":
    main()
