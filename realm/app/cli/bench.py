"""`realm bench …`: each benchmark prints one table, with ratios taken in one run."""

import argparse
from pathlib import Path

from realm.app.cli.common import open_run
from realm.errors import UserError


def add_bench_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommands and their options."""
    bench = commands.add_parser("bench", help="benchmarks", description="Benchmarks; each prints one table.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    spans = kinds.add_parser(
        "spans", add_help=False, help="salient spans against annotated text: precision, recall, F1, sentences a second"
    )
    spans.set_defaults(command=_spans, takes_overrides=True)
    attention = kinds.add_parser(
        "attention", help="time and memory of every attention variant by length, beside other implementations"
    )
    attention.add_argument(
        "--variants", nargs="+", metavar="TYPE", help="names, or '{type: longformer, window: 128}' (default: all)"
    )
    attention.add_argument(
        "--lengths", nargs="+", type=int, metavar="L", help="tokens (default: 512, doubled up to 32768)"
    )
    attention.add_argument("--heads", type=int, default=6, help="attention heads (default: 6)")
    attention.add_argument("--head-width", type=int, default=64, help="width of a head (default: 64)")
    attention.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: fp32)"
    )
    attention.add_argument(
        "--no-projections", action="store_true", help="the attention alone, without making queries, keys and values"
    )
    attention.add_argument("--no-peers", action="store_true", help="our variants alone")
    attention.add_argument(
        "--limit",
        type=float,
        default=60.0,
        metavar="S",
        help="leave out lengths likely to take longer a pass (default: 60)",
    )
    attention.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    attention.add_argument("--picture", type=Path, metavar="FILE", help="draw time, memory and approximation error")
    attention.set_defaults(command=_attention, takes_overrides=False)
    long = kinds.add_parser(
        "long", help="what every attention variant can do on texts longer than it was trained on, and what that costs"
    )
    long.add_argument(
        "--variants",
        nargs="+",
        metavar="TYPE",
        help="names, or '{type: longformer, window: 8}' (default: each, of sizes that suit)",
    )
    long.add_argument("--tasks", nargs="+", metavar="TASK", help="passkey, 'masked span', listops (default: all)")
    long.add_argument("--steps", type=int, metavar="N", help="training steps (default: each task's own)")
    long.add_argument("--tests", type=int, default=1000, help="texts tested of each length (default: 1000)")
    long.add_argument("--seed", type=int, default=0)
    long.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    long.set_defaults(command=_long, takes_overrides=False)
    store = kinds.add_parser(
        "index",
        help="encoding beside sentence-transformers, approximate search beside exact, opening",
        allow_abbrev=False,
    )
    store.add_argument("--run", type=Path, required=True, help="run folder; its newest index and encoder are used")
    store.add_argument("--passages", type=int, default=2000, help="passages to encode (default: 2000)")
    store.add_argument("--queries", type=int, default=256, help="queries to search (default: 256)")
    store.add_argument(
        "--scale", type=int, default=0, metavar="N", help="search N rows, too: the embeddings repeated with jitter"
    )
    store.add_argument(
        "--synthetic", metavar="NxD", help="build and search an index of random vectors, too, such as 10000000x128"
    )
    store.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    store.add_argument("--picture", type=Path, metavar="FILE", help="draw recall against speed")
    store.set_defaults(command=_index, takes_overrides=True)
    swaps = kinds.add_parser("swaps", help="step times of a trainer with and without index versions swapped in")
    swaps.add_argument("--rows", type=int, default=1_000_000, help="rows of the index (default: 1,000,000)")
    swaps.add_argument("--dim", type=int, default=128, help="its dimensions (default: 128)")
    swaps.add_argument("--steps", type=int, default=1200, help="steps of each kind (default: 1200)")
    swaps.add_argument("--every", type=int, default=200, help="steps between two versions (default: 200)")
    swaps.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    swaps.set_defaults(command=_swaps, takes_overrides=False)
    faults = kinds.add_parser(
        "faults",
        help="kill -9 at random, flipped bits, frozen lease holders, a full disk: what the index store survives",
    )
    faults.add_argument("--kills", type=int, default=500, help="kill -9 of refresher and trainer (default: 500)")
    faults.add_argument(
        "--flips", type=int, default=1000, help="bit flips and cuts in the files of a version (default: 1000)"
    )
    faults.add_argument("--seed", type=int, default=0)
    faults.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    faults.set_defaults(command=_faults, takes_overrides=False)


def _spans(options: argparse.Namespace) -> None:
    from realm.bench.spans import main

    main(options.overrides)


def _attention(options: argparse.Namespace) -> None:
    from realm.bench.attention import LENGTHS, Setting, bench_attention

    lengths = tuple(sorted(set(options.lengths or LENGTHS)))
    setting = Setting(
        lengths, options.heads, options.head_width, options.precision, not options.no_projections, options.limit
    )
    bench_attention(options.variants, setting, not options.no_peers, options.json, options.picture)


def _long(options: argparse.Namespace) -> None:
    from realm.bench.long import VARIANTS, bench_long
    from realm.bench.long_tasks import TASKS

    bench_long(
        options.variants or VARIANTS,
        options.tasks or list(TASKS),
        options.seed,
        options.tests,
        options.steps,
        options.json,
    )


def _index(options: argparse.Namespace) -> None:
    from index.bench.store import bench_index

    bench_index(
        open_run(options),
        options.passages,
        options.queries,
        options.scale,
        options.synthetic,
        options.json,
        options.picture,
    )


def _swaps(options: argparse.Namespace) -> None:
    from index.bench.swaps import bench_swaps

    bench_swaps(options.rows, options.dim, options.steps, options.every, options.json)


def _faults(options: argparse.Namespace) -> None:
    from index.bench.faults import bench_faults

    report = bench_faults(options.kills, options.flips, options.seed, options.json)
    if report.violations:
        raise UserError(f"{len(report.violations)} violations.")
