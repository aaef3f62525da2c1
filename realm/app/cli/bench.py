"""`realm bench …`: each benchmark prints one table; ratios are measured within one run."""

import argparse

from realm.app.cli.arguments import path_option, seconds, shape, whole
from realm.app.cli.common import open_run
from realm.errors import UserError


def add_bench_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands and their options."""
    bench = commands.add_parser("bench", help="run a benchmark", description="Benchmarks; each prints one table.")
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    spans = kinds.add_parser("spans", help="span tagger on annotated text: precision, recall, F1, sentences per second")
    spans.add_argument(
        "--entities", type=path_option, metavar="FILE", help="CoNLL file (.gz or plain) of named entities"
    )
    spans.add_argument(
        "--dates", type=path_option, metavar="FILE", help="CoNLL file (.gz or plain) of date expressions"
    )
    spans.add_argument(
        "--pipeline", default="builtin", help='"builtin" or a spaCy pipeline by name or path (default: %(default)s)'
    )
    spans.add_argument("--json", type=path_option, metavar="FILE", help="also write the rows to this file")
    spans.set_defaults(command=_spans)
    attention = kinds.add_parser(
        "attention", help="time and memory of attention variants by length, compared with other implementations"
    )
    attention.add_argument(
        "--variants",
        nargs="+",
        metavar="TYPE",
        help="names, or mappings such as '{type: longformer, window: 128}' (default: all)",
    )
    attention.add_argument(
        "--lengths", nargs="+", type=whole(1), metavar="L", help="lengths in tokens (default: 512, 1024, … 32768)"
    )
    attention.add_argument("--heads", type=whole(1), default=6, help="attention heads (default: 6)")
    attention.add_argument("--head-width", type=whole(1), default=64, help="width of a head (default: 64)")
    attention.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: fp32)"
    )
    attention.add_argument(
        "--no-projections", action="store_true", help="measure without the projections to queries, keys and values"
    )
    attention.add_argument("--no-peers", action="store_true", help="measure only the variants of this package")
    attention.add_argument(
        "--limit",
        type=seconds,
        default=60.0,
        metavar="S",
        help="skip lengths that are expected to take longer than S seconds per pass (default: 60)",
    )
    attention.add_argument("--json", type=path_option, metavar="FILE", help="also write the figures to FILE")
    attention.add_argument(
        "--picture", type=path_option, metavar="FILE", help="plot time, memory and approximation error"
    )
    attention.set_defaults(command=_attention)
    long = kinds.add_parser(
        "long", help="accuracy of attention variants on texts longer than in training, and their cost"
    )
    long.add_argument(
        "--variants",
        nargs="+",
        metavar="TYPE",
        help="names, or mappings such as '{type: longformer, window: 8}' (default: all, with suitable sizes)",
    )
    long.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="any of passkey, 'masked span', listops (default: all)"
    )
    long.add_argument("--steps", type=whole(1), metavar="N", help="training steps (default: depends on the task)")
    long.add_argument("--tests", type=whole(1), default=1000, help="test texts per length (default: 1000)")
    long.add_argument("--seed", type=whole(0), default=0)
    long.add_argument("--json", type=path_option, metavar="FILE", help="also write the figures to FILE")
    long.set_defaults(command=_long)
    store = kinds.add_parser(
        "index",
        help="encoding vs. sentence-transformers, approximate vs. exact search, and opening an index",
    )
    store.add_argument(
        "--run", type=path_option, required=True, help="run folder; the newest index and encoder are used"
    )
    store.add_argument("--passages", type=whole(1), default=2000, help="passages to encode (default: 2000)")
    store.add_argument("--queries", type=whole(1), default=256, help="queries to search (default: 256)")
    store.add_argument(
        "--scale", type=whole(0), default=0, metavar="N", help="also search N rows: the embeddings repeated with noise"
    )
    store.add_argument(
        "--synthetic",
        type=shape,
        metavar="NxD",
        help="also build and search an index of random vectors, such as 10000000x128",
    )
    store.add_argument("--json", type=path_option, metavar="FILE", help="also write the figures to FILE")
    store.add_argument("--picture", type=path_option, metavar="FILE", help="plot recall against speed")
    store.set_defaults(command=_index, takes_overrides=True)
    swaps = kinds.add_parser("swaps", help="step time of a trainer with and without index swaps")
    swaps.add_argument("--rows", type=whole(1), default=1_000_000, help="rows of the index (default: 1,000,000)")
    swaps.add_argument("--dim", type=whole(1), default=128, help="dimension of the index (default: 128)")
    swaps.add_argument(
        "--steps", type=whole(1), default=1200, help="steps with swaps, and as many without (default: 1200)"
    )
    swaps.add_argument("--every", type=whole(1), default=200, help="steps between swaps (default: 200)")
    swaps.add_argument("--json", type=path_option, metavar="FILE", help="also write the figures to FILE")
    swaps.set_defaults(command=_swaps)
    faults = kinds.add_parser(
        "faults",
        help="fault tests of the index store: kill -9, bit flips, suspended lease holders, a full disk",
    )
    faults.add_argument(
        "--kills", type=whole(0), default=500, help="number of kills (SIGKILL) of refresher and trainer (default: 500)"
    )
    faults.add_argument(
        "--flips",
        type=whole(0),
        default=1000,
        help="number of bit flips and truncations in the files of a version (default: 1000)",
    )
    faults.add_argument("--seed", type=whole(0), default=0)
    faults.add_argument("--seeds", type=whole(1), default=1, metavar="N", help="use N consecutive seeds (default: 1)")
    faults.add_argument(
        "--load", type=whole(0), default=0, metavar="N", help="N processes that compute at the same time (default: 0)"
    )
    faults.add_argument("--json", type=path_option, metavar="FILE", help="also write the figures to FILE")
    faults.set_defaults(command=_faults)


def _spans(options: argparse.Namespace) -> None:
    from realm.bench.spans import report_spans

    report_spans(options.entities, options.dates, options.pipeline, options.json)


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

    reports = bench_faults(options.kills, options.flips, options.seed, options.seeds, options.load, options.json)
    num_violations = sum(len(report.violations) for report in reports)
    if num_violations:
        raise UserError(f"{num_violations} violations of the guarantees of the index store, listed above.")
