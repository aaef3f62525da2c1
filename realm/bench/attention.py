"""`realm bench attention`: time and memory of every attention variant by length, compared with
other implementations (peers) in one run.

Each variant runs in a separate process, from the shortest to the longest text, so that the peak
memory of the process is that of the longest text so far. Times are the best of a few repetitions of
the module alone; memory is the increase of the peak since before the first forward pass.

Shape legend: B rows, H heads, L tokens, D width of a head, M features.
"""

import itertools
import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from realm.attention import AttentionConfig
from realm.attention.performer import draw_projection, random_feature_attention
from realm.bench.attention_cases import (
    PEER_OF,
    Shape,
    build_call,
    installed_peers,
    parse_variant,
    registered_variants,
)
from realm.errors import UserError
from realm.models.precision import Precision, autocast
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console, peak_memory, print_table, progress

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_REPEATS, _MAX_SECONDS = 5, 1.5
_GROWTH_FROM_TOKENS = 4096
_FEATURES = (16, 32, 64, 128, 256, 512)
_DEVIATIONS = (0.5, 1.0)
"""Standard deviations of the entries of queries and keys: scores with small and with large
differences."""
_NUM_DRAWS = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Settings of all measurements."""

    lengths: tuple[int, ...] = LENGTHS
    """Text lengths in tokens, ascending."""
    heads: int = 6
    head_width: int = 64
    precision: Precision = "fp32"
    """fp32, or bf16 by autocast."""
    projections: bool = True
    """Whether the module has projections, or uses hidden states as queries, keys and values."""
    limit_s: float = 60.0
    """Lengths that are likely to take longer per pass are skipped."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = torch.get_num_threads()

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 64:
            raise UserError(f"--lengths must be 64 tokens or more, got {min(self.lengths, default=None)}.")
        if min(self.heads, self.head_width) < 1:
            raise UserError(f"--heads and --head-width must be at least 1, got {self.heads} and {self.head_width}.")


def bench_attention(
    variants: Sequence[str] | None, setting: Setting, peers: bool, json_file: Path | None, picture: Path | None
) -> list[Row]:
    """Measure, print one table, and write rows and picture to the given files; returns one row per
    variant and length."""
    for file in (json_file, picture):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: the folder {file.parent} does not exist; create it first.")
    cases: dict[str, AttentionConfig | str] = dict(
        registered_variants() if variants is None else {text: parse_variant(text) for text in variants}
    )
    if peers:
        wanted = None if variants is None else [PEER_OF[text] for text in variants if text in PEER_OF]
        names, missing = installed_peers(wanted)
        cases |= {name: name for name in names}
        for name, reason in missing.items():
            console.print(f"  {name}: skipped ({reason})")
    size = f"{setting.heads} heads of width {setting.head_width}"
    module = "self-attention module" if setting.projections else "self-attention without projections"
    console.print(
        f"  {setting.device}, {setting.precision}, {size}, batch size 1, forward and backward pass of the {module}"
    )
    rows: list[Row] = []
    with progress("attention", len(cases), unit="variant", every_s=20) as ticker:
        for number, (name, case) in enumerate(cases.items(), 1):
            rows += [{"what": name, "peer": isinstance(case, str), **row} for row in measure_case(case, setting)]
            ticker.update(number)
    errors = approximation_errors(setting.head_width)
    report(rows, setting.lengths)
    report_errors(errors)
    if json_file is not None:
        write_json_atomic(json_file, {"setting": asdict(setting), "rows": rows, "approximation": errors})
    if picture is not None:
        plot(rows, errors, picture)
    return rows


def measure_case(case: AttentionConfig | str, setting: Setting) -> list[Row]:
    """One row per length, shortest first, up to the first length that fails or would exceed the
    time limit."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_lengths, args=(sender, case, setting))
    process.start()
    sender.close()
    rows: list[Row] = []
    try:
        while True:
            rows.append(receiver.recv())
    except EOFError:
        pass
    process.join()
    if len(rows) < len(setting.lengths) and process.exitcode != 0:
        rows.append(
            {"tokens": setting.lengths[len(rows)], "failed": f"the process exited with code {process.exitcode}"}
        )
    return rows


def _measure_lengths(sender: Any, case: AttentionConfig | str, setting: Setting) -> None:
    device = setting.device
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    # Threads and buffers of the matrix library do not count as memory of the variant.
    warmup = torch.randn(1, 256, 64, requires_grad=True)
    (warmup @ warmup.transpose(1, 2)).sum().backward()
    before_gib, previous_s = _peak_memory_gib(device), 0.0
    for length in setting.lengths:
        if previous_s * 2 > setting.limit_s:
            break
        shape = Shape(setting.heads, setting.head_width, length, setting.projections)
        try:
            call = build_call(case, shape, device)
            hidden_BLW = torch.randn(1, length, shape.width, device=device, requires_grad=True)
            forward_s, total_s = _time_passes(call, hidden_BLW, setting.precision, device)
        except (RuntimeError, ValueError, TypeError, MemoryError, UserError) as error:  # also of other packages
            sender.send({"tokens": length, "failed": str(error).splitlines()[0][:200]})
            break
        previous_s = total_s
        mib = (_peak_memory_gib(device) - before_gib) * 1024
        sender.send({"tokens": length, "forward_s": forward_s, "seconds": total_s, "mib": mib})
    sender.close()


def _time_passes(call: Any, hidden_BLW: torch.Tensor, precision: Precision, device: str) -> tuple[float, float]:
    """Best time in seconds of a forward pass, and of forward and backward pass."""
    grad_out_BLW = torch.randn_like(hidden_BLW)
    forward_s, total_s, began = math.inf, math.inf, time.perf_counter()
    for _ in range(_REPEATS):
        start = time.perf_counter()
        with autocast(torch.device(device), precision):
            out_BLW = call(hidden_BLW)
        _synchronize(device)
        middle = time.perf_counter()
        out_BLW.backward(grad_out_BLW.to(out_BLW.dtype))
        _synchronize(device)
        end = time.perf_counter()
        forward_s, total_s = min(forward_s, middle - start), min(total_s, end - start)
        if end - began > _MAX_SECONDS:
            break
    return forward_s, total_s


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory_gib(device: str) -> float:
    """Peak memory of the process so far, in GiB."""
    return peak_memory()["peak_gpu_gib" if device == "cuda" else "peak_gib"]


def approximation_errors(head_width: int, length: int = 512) -> list[Row]:
    """Relative error of random features for softmax attention, by their kind and number; median
    over projections.

    Measured for scores with small and with large differences; entries of values have a standard
    deviation of 1 (compare Choromanski et al. 2021, figure 4).
    """
    rows: list[Row] = []
    real_BL = torch.ones(1, length, dtype=torch.bool)
    for deviation in _DEVIATIONS:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, 1, length, head_width, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        query, key = query * deviation, key * deviation
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        for kernel, orthogonal, count in itertools.product(("softmax", "trigonometric"), (True, False), _FEATURES):
            errors = []
            projection_rows = count // 2 if kernel == "trigonometric" else count
            for _ in range(_NUM_DRAWS):
                projection_MD = draw_projection(projection_rows, head_width, orthogonal, generator).double()
                out = random_feature_attention(query, key, value, projection_MD, real_BL, kernel)
                errors.append(float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
            kernel_name = "positive" if kernel == "softmax" else "trigonometric"
            kind = f"{kernel_name}, {'orthogonal' if orthogonal else 'independent'}"
            rows.append(
                {"deviation": deviation, "features": kind, "count": count, "error": sorted(errors)[len(errors) // 2]}
            )
    return rows


def growth(rows: Sequence[Row], key: str) -> float | None:
    """Growth factor of `key` per doubling of the length, from 4,096 tokens to the longest text."""
    long_rows = [row for row in rows if key in row and row["tokens"] >= _GROWTH_FROM_TOKENS]
    if len(long_rows) < 2 or long_rows[0][key] <= 0:
        return None
    first, last = long_rows[0], long_rows[-1]
    return float((last[key] / first[key]) ** (1 / math.log2(last["tokens"] / first["tokens"])))


def report(rows: Sequence[Row], lengths: Sequence[int]) -> None:
    """Print the table: seconds by length, memory at the longest text, growth, and speed compared
    with dense attention and with the peer of the variant."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["what"], []).append(row)

    def seconds(name: str, length: int) -> float | None:
        return next((row.get("seconds") for row in by_name.get(name, []) if row["tokens"] == length), None)

    compared = max((length for length in lengths if length <= 8192 and seconds("dense", length)), default=max(lengths))
    table = []
    for name, own_rows in by_name.items():
        cells: list[object] = [
            name,
            *(None if (s := seconds(name, length)) is None else f"{s:.3g}" for length in lengths),
        ]
        last = [row for row in own_rows if "mib" in row][-1:]
        cells.append(f"{last[0]['mib']:,.0f}" if last else None)
        cells += [None if (g := growth(own_rows, key)) is None else f"{g:.2f}" for key in ("seconds", "mib")]
        for baseline in ("dense", PEER_OF.get(name)):
            baseline_s, own_s = seconds(baseline, compared) if baseline else None, seconds(name, compared)
            cells.append(None if baseline_s is None or own_s is None else f"{baseline_s / own_s:.1f}")
        table.append(cells)
        table += [
            [f"  {row['tokens']:,} tokens: {row['failed']}", *[None] * (len(cells) - 1)]
            for row in own_rows
            if "failed" in row
        ]
    columns = [
        "forward and backward, s",
        *(f"{length:,}" for length in lengths),
        "MiB at the longest",
        "time per doubling",
        "MiB per doubling",
        f"speedup over dense at {compared:,}",
        f"speedup over peer at {compared:,}",
    ]
    print_table("Self-attention by length", columns, table)


def report_errors(errors: Sequence[Row]) -> None:
    """Print the table of `approximation_errors`."""
    error_of = {(row["deviation"], row["features"], row["count"]): row["error"] for row in errors}
    cases = dict.fromkeys((row["deviation"], row["features"]) for row in errors)
    table = [
        [str(deviation), kind, *(f"{error_of[deviation, kind, count]:.3g}" for count in _FEATURES)]
        for deviation, kind in cases
    ]
    title = (
        "Random features: relative error of attention, median over projections, "
        "by the standard deviation of queries and keys"
    )
    print_table(title, ["deviation", "features", *map(str, _FEATURES)], table)


def plot(rows: Sequence[Row], errors: Sequence[Row], picture: Path) -> None:
    """Plot time and memory by length, and the error of random features by their number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2 + len(_DEVIATIONS), figsize=(24, 5.5), constrained_layout=True)
    names = list(dict.fromkeys(row["what"] for row in rows))
    colors = {
        name: f"C{number % 10}" for number, name in enumerate(name for name in names if name not in PEER_OF.values())
    }
    colors |= {peer: colors[name] for name, peer in PEER_OF.items() if name in colors}
    for panel, key, title in (
        (panels[0], "seconds", "forward and backward, seconds"),
        (panels[1], "mib", "peak memory, MiB (at least 1)"),
    ):
        floor = 1.0 if key == "mib" else 0.0  # the increase may be 0, which a logarithmic axis cannot show
        for name in names:
            own_rows = [row for row in rows if row["what"] == name and key in row]
            style = "--" if any(row["peer"] for row in own_rows) else "-"
            panel.plot(
                [row["tokens"] for row in own_rows],
                [max(row[key], floor) for row in own_rows],
                style + "o",
                markersize=3,
                color=colors.get(name),
                label=name,
            )
        panel.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        lengths = sorted({row["tokens"] for row in rows})
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    for panel, deviation in zip(panels[2:], _DEVIATIONS, strict=True):
        for kind in dict.fromkeys(row["features"] for row in errors):
            kind_rows = [row for row in errors if row["features"] == kind and row["deviation"] == deviation]
            counts, values = [row["count"] for row in kind_rows], [row["error"] for row in kind_rows]
            panel.plot(counts, values, marker="o", markersize=3, label=kind)
        title = (
            f"performer: relative error of softmax attention,\nstandard deviation of queries and keys: {deviation:g}"
        )
        panel.set(title=title, xlabel="random features", xscale="log", yscale="log")
        panel.set_xticks(_FEATURES, list(map(str, _FEATURES)))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(picture, dpi=90)
    plt.close(figure)
