"""Show a figure of a run's metrics over the steps of a stage.

python examples/plot_metrics.py runs/demo --stage pretrain --figure utility --picture utility.png
"""

import argparse
from pathlib import Path

import realm

WIDTH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a figure of a run's metrics over the steps of a stage.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("--stage", default="pretrain", help="training stage (default: pretrain)")
    parser.add_argument("--figure", default="loss", help="figure of metrics.jsonl (default: loss)")
    parser.add_argument("--lines", type=int, default=20, help="lines to print, each a mean over steps (default: 20)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot the curve to this file instead")
    options = parser.parse_args()

    rows = realm.read_metrics(options.run / "metrics.jsonl")[options.stage]
    steps = [int(row["step"]) for row in rows if options.figure in row]
    values = [float(row[options.figure]) for row in rows if options.figure in row]
    if options.picture is not None:
        import matplotlib.pyplot as plt

        plt.plot(steps, values)
        plt.xlabel(f"step of {options.stage}")
        plt.ylabel(options.figure)
        plt.savefig(options.picture)
        return
    size = max(1, -(-len(values) // options.lines))
    means = {steps[i]: sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])}
    low, high = min(means.values()), max(means.values())
    print(f"{options.stage}: {options.figure}, mean of {size} steps")
    for step, mean in means.items():
        print(f"  {step:>7}  {mean:10.4f}  {'█' * round(WIDTH * (mean - low) / (high - low or 1))}")


if __name__ == "__main__":
    main()
