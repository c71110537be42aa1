"""Compares the model with golden data of the official implementation: `python -m tools.check_parity [--reference DIR]`.

Walks a directory of the layout that `../shared/reference/README.md` describes, runs every golden and prints a row for each file:
how many of its arrays were compared, the comparison closest to its tolerance, equal expert ids and generated ids. Exits with 1 if
a row fails, or if a file or an array was not covered.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import jax

from interns1pro_jax.sharding import make_mesh
from tools.parity import plan
from tools.parity.golden import Row

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "reference"
_PROBLEMS_SHOWN = 10  # of a file


def main() -> int:
    """Returns the exit status: 0 if everything agrees, 1 if not, 2 if there is nothing to compare with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=Path(os.environ.get("INTERNS1PRO_REFERENCE", DEFAULT)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is printed, and every comparison, to this file")
    arguments = parser.parse_args()
    reference: Path = arguments.reference.absolute()
    if not reference.is_dir():
        print(f"error: there is no directory {reference}; give one with --reference.", file=sys.stderr)
        return 2
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        print(f"error: there is no directory for {arguments.json}; make it, or give another file with --json.", file=sys.stderr)
        return 2
    checked, later, unknown = plan.files(reference)
    if not checked:
        print(f"error: {reference} holds no golden data; give a directory of that layout with --reference.", file=sys.stderr)
        return 2
    width = max(len(_name(reference, path)) for path in checked)
    print(f"{'file':{width}}  arrays  {'worst error / tolerance':46}  experts  tokens  seconds")
    rows: list[Row] = []
    with jax.default_matmul_precision("highest"), jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for row in plan.run(reference, checked):
            rows.append(row)
            print(_line(row, width), flush=True)
            for text in row.problems[:_PROBLEMS_SHOWN]:
                print(f"    FAIL {text}", flush=True)
            if (hidden := len(row.problems) - _PROBLEMS_SHOWN) > 0:
                print(f"    FAIL and {hidden} more", flush=True)
            for text in row.notes:
                print(f"    note: {text}", flush=True)
    for path in later:
        print(f"not yet covered: {_name(reference, path)} ({plan.WHY_LATER})")
    for path in unknown:
        print(f"FAIL no check covers {_name(reference, path)}")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed, {len(unknown)} unknown, {len(later)} not yet covered")
    if arguments.json is not None:
        report = {
            "passed": not failed and not unknown,
            "rows": [row.to_json() for row in rows],
            "unknown": [_name(reference, path) for path in unknown],
            "not_yet_covered": [_name(reference, path) for path in later],
        }
        arguments.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 1 if failed or unknown else 0


def _name(reference: Path, path: Path) -> str:
    return path.relative_to(reference).as_posix()


def _line(row: Row, width: int) -> str:
    worst = "equal"
    if (comparison := row.worst) is not None and comparison.error > 0:
        worst = f"{comparison.array[-24:]:24} {comparison.error:.1e}/{comparison.tolerance:.0e}{' rel' if comparison.relative else ''}"
    experts = str(row.experts) if row.experts.total else str(row.bf16_experts)
    state = "PASS" if row.passed else "FAIL"
    return (
        f"{row.file:{width}}  {row.compared:3}/{row.arrays:<3} {worst:46}  {experts:>7}  {row.generated!s:>6}  {row.seconds:6.1f}  {state}"
    )


if __name__ == "__main__":
    try:
        status = main()
    except BrokenPipeError:  # the reader of the output has gone: what is left cannot be shown, and must not look like success
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
