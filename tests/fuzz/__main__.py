"""`python -m tests.fuzz`: run the fuzz targets and print a table; exit status 1 on a failure.

Every target runs in a process of its own, so that an input that kills the process or cannot be
interrupted is reported, too. `--target NAME --seed SEED --case NUMBER` repeats one case.
"""

import argparse
import math
import sys
import time

from tests.fuzz.processes import run_in_processes
from tests.fuzz.runner import case_of
from tests.fuzz.targets import load_targets


def main() -> int:
    """Run the targets that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="number of cases of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--case", type=int, help="only this case, with its content")
    options = parser.parse_args()
    targets = load_targets()
    if unknown := set(options.target or ()) - set(targets):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose from {', '.join(targets)}")
    names = options.target or list(targets)
    per_share = options.cases / sum(targets[name].share for name in names)
    print(f"{'target':<24}{'cases':>8}{'accepted':>10}{'refused':>9}{'skipped':>9}{'failures':>10}  slowest")
    failed = False
    for name in names:
        numbers = range(math.ceil(per_share * targets[name].share))
        if options.case is not None:
            numbers = range(options.case, options.case + 1)
            print(case_of(targets[name], options.seed, options.case))
        started = time.monotonic()
        report, died = run_in_processes(targets[name], options.seed, numbers)
        failures = len(report.failures) + len(died)
        print(
            f"{name:<24}{report.cases:>8,}{report.accepted:>10,}{report.refused:>9,}{report.skipped:>9,}{failures:>10,}"
            f"  {1000 * report.slowest_s:.0f} ms (case {report.slowest}), {time.monotonic() - started:.0f} s in all",
            flush=True,
        )
        failed |= failures > 0
        shown: set[str] = set()
        for failure in report.failures:
            if failure.kind not in shown:
                shown.add(failure.kind)
                same = sum(other.kind == failure.kind for other in report.failures)
                _print_failure(name, options.seed, failure.number, f"({same} x) {failure.why}")
                print(f"    content: {failure.case.content[:600]!r} settings: {failure.case.settings}")
        for number, why in died:
            _print_failure(name, options.seed, number, why)
    return int(failed)


def _print_failure(name: str, seed: int, number: int, why: str) -> None:
    print(f"  python -m tests.fuzz --target {name} --seed {seed} --case {number}\n    " + why.replace("\n", "\n    "))


if __name__ == "__main__":
    sys.exit(main())
