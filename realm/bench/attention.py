"""`realm bench attention`: time and memory of every attention variant over growing lengths, beside
other implementations, in one run.

Each variant runs in a process of its own, length after length, so that the process's peak memory is
that of the longest text so far. Times are the best of a few repetitions of the module alone; memory
is what the peak adds to the process before its first forward pass.

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
from realm.bench.attention_cases import PEER_OF, Shape, build_call, every_variant, installed_peers, parse_variant
from realm.errors import UserError
from realm.models.precision import Precision, autocast
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console, peak_memory, print_table, progress

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_REPEATS, _SECONDS_EACH = 5, 1.5
_GROWTH_FROM = 4096
_FEATURES = (16, 32, 64, 128, 256, 512)
_DEVIATIONS = (0.5, 1.0)
"""Of the entries of queries and keys: scores that differ little, and scores that differ much."""
_DRAWS = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How everything is measured."""

    lengths: tuple[int, ...] = LENGTHS
    """Tokens, ascending."""
    heads: int = 6
    head_width: int = 64
    precision: Precision = "fp32"
    """fp32, or bf16 by autocast."""
    projections: bool = True
    """Whether queries, keys and values are made by the module, or hidden states stand for them."""
    limit_s: float = 60.0
    """Lengths likely to take longer a pass are left out."""
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
    """Measure, print one table, and write rows and picture where asked; returns a row for each
    variant and length."""
    for file in (json_file, picture):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent}; make it first.")
    cases: dict[str, AttentionConfig | str] = dict(
        every_variant() if variants is None else {text: parse_variant(text) for text in variants}
    )
    if peers:
        names, missing = installed_peers(
            None if variants is None else [PEER_OF[text] for text in variants if text in PEER_OF]
        )
        cases |= {name: name for name in names}
        for name, reason in missing.items():
            console.print(f"  {name} is left out ({reason})")
    size = f"{setting.heads} heads of {setting.head_width}"
    what = "module" if setting.projections else "alone, without projections"
    console.print(
        f"  {setting.device}, {setting.precision}, {size}, one row, forward and backward of the self-attention {what}"
    )
    rows: list[Row] = []
    with progress("attention", len(cases), unit="variant", every_s=20) as ticker:
        for number, (name, case) in enumerate(cases.items(), 1):
            rows += [{"what": name, "peer": isinstance(case, str), **row} for row in measured(case, setting)]
            ticker.update(number)
    errors = approximation_errors(setting.head_width)
    report(rows, setting.lengths)
    report_errors(errors)
    if json_file is not None:
        write_json_atomic(json_file, {"setting": asdict(setting), "rows": rows, "approximation": errors})
    if picture is not None:
        draw(rows, errors, picture)
    return rows


def measured(case: AttentionConfig | str, setting: Setting) -> list[Row]:
    """A row for each length, shortest first, up to the first that failed or would take longer
    than the limit."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, case, setting))
    process.start()
    theirs.close()
    rows: list[Row] = []
    try:
        while True:
            rows.append(ours.recv())
    except EOFError:
        pass
    process.join()
    if len(rows) < len(setting.lengths) and process.exitcode != 0:
        rows.append({"tokens": setting.lengths[len(rows)], "failed": f"the process ended with {process.exitcode}"})
    return rows


def _measure(pipe: Any, case: AttentionConfig | str, setting: Setting) -> None:
    device = setting.device
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    warm = torch.randn(1, 256, 64, requires_grad=True)
    (warm @ warm.transpose(1, 2)).sum().backward()  # threads and buffers of the matrix library are no variant's memory
    before, slowest = _memory(device), 0.0
    for length in setting.lengths:
        if slowest * 2 > setting.limit_s:
            break
        shape = Shape(setting.heads, setting.head_width, length, setting.projections)
        try:
            call = build_call(case, shape, device)
            forward_s, total_s = _times(
                call, torch.randn(1, length, shape.width, device=device, requires_grad=True), setting.precision, device
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            MemoryError,
            UserError,
        ) as error:  # of other packages, too: the row says what it was
            pipe.send({"tokens": length, "failed": str(error).splitlines()[0][:200]})
            break
        slowest = total_s
        pipe.send(
            {"tokens": length, "forward_s": forward_s, "seconds": total_s, "mib": (_memory(device) - before) * 1024}
        )
    pipe.close()


def _times(call: Any, hidden_BLW: torch.Tensor, precision: Precision, device: str) -> tuple[float, float]:
    """Best seconds of a forward pass, and of forward and backward."""
    gradient = torch.randn_like(hidden_BLW)
    forward, total, began = math.inf, math.inf, time.perf_counter()
    for _ in range(_REPEATS):
        start = time.perf_counter()
        with autocast(torch.device(device), precision):
            out_BLW = call(hidden_BLW)
        _wait(device)
        middle = time.perf_counter()
        out_BLW.backward(gradient.to(out_BLW.dtype))
        _wait(device)
        end = time.perf_counter()
        forward, total = min(forward, middle - start), min(total, end - start)
        if end - began > _SECONDS_EACH and total < math.inf:
            break
    return forward, total


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str) -> float:
    """Peak GiB so far."""
    return peak_memory()["peak_gpu_gib" if device == "cuda" else "peak_gib"]


def approximation_errors(head_width: int, length: int = 512) -> list[Row]:
    """Relative error of random features for softmax attention by kind and number, median over
    drawings.

    Twice, for scores that differ little and for such that differ much; entries of values have a
    deviation of one (compare Choromanski et al. 2021, figure 4).
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
            for _ in range(_DRAWS):
                projection_MD = draw_projection(
                    count // 2 if kernel == "trigonometric" else count, head_width, orthogonal, generator
                ).double()
                out = random_feature_attention(query, key, value, projection_MD, real_BL, kernel)
                errors.append(float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
            kind = f"{'positive' if kernel == 'softmax' else 'trigonometric'}, {'orthogonal' if orthogonal else 'independent'}"
            rows.append(
                {"deviation": deviation, "features": kind, "count": count, "error": sorted(errors)[len(errors) // 2]}
            )
    return rows


def growth(rows: Sequence[Row], key: str) -> float | None:
    """Factor by which `key` grows per doubling of the length, from 4,096 tokens to the longest
    measured."""
    inside = [row for row in rows if key in row and row["tokens"] >= _GROWTH_FROM]
    if len(inside) < 2 or inside[0][key] <= 0:
        return None
    return float((inside[-1][key] / inside[0][key]) ** (1 / math.log2(inside[-1]["tokens"] / inside[0]["tokens"])))


def report(rows: Sequence[Row], lengths: Sequence[int]) -> None:
    """The table: seconds by length, memory at the longest, growth, and speed beside dense
    attention and beside the peer of the same name."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["what"], []).append(row)

    def seconds(name: str, length: int) -> float | None:
        return next((row.get("seconds") for row in by_name.get(name, []) if row["tokens"] == length), None)

    compared = max((length for length in lengths if length <= 8192 and seconds("dense", length)), default=max(lengths))
    table = []
    for name, mine in by_name.items():
        load_baseline = PEER_OF.get(name)
        cells: list[object] = [
            name,
            *(None if (s := seconds(name, length)) is None else f"{s:.3g}" for length in lengths),
        ]
        last = [row for row in mine if "mib" in row][-1:]
        cells.append(f"{last[0]['mib']:,.0f}" if last else None)
        cells += [None if (g := growth(mine, key)) is None else f"{g:.2f}" for key in ("seconds", "mib")]
        for other, at in (("dense", compared), (load_baseline, compared)):
            a, b = seconds(other, at) if other else None, seconds(name, at)
            cells.append(None if a is None or b is None else f"{a / b:.1f}")
        table.append(cells)
        table += [
            [f"  {row['tokens']:,} tokens: {row['failed']}", *[None] * (len(cells) - 1)]
            for row in mine
            if "failed" in row
        ]
    columns = [
        "forward and backward, s",
        *(f"{length:,}" for length in lengths),
        "MiB at the longest",
        "time x2",
        "MiB x2",
    ]
    print_table(
        "Self-attention by length", [*columns, f"times as fast as dense at {compared:,}", "as its peer there"], table
    )


def report_errors(errors: Sequence[Row]) -> None:
    """The table of `approximation_errors`."""
    found = {(row["deviation"], row["features"], row["count"]): row["error"] for row in errors}
    cases = dict.fromkeys((row["deviation"], row["features"]) for row in errors)
    table = [
        [str(deviation), kind, *(f"{found[deviation, kind, count]:.3g}" for count in _FEATURES)]
        for deviation, kind in cases
    ]
    title = "Random features: relative error of attention, median of drawings, by the deviation of the entries of queries and keys"
    print_table(title, ["deviation", "features", *map(str, _FEATURES)], table)


def draw(rows: Sequence[Row], errors: Sequence[Row], picture: Path) -> None:
    """Time and memory over length, and the error of random features over their number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2 + len(_DEVIATIONS), figsize=(24, 5.5), constrained_layout=True)
    names = list(dict.fromkeys(row["what"] for row in rows))
    colours = {
        name: f"C{number % 10}" for number, name in enumerate(name for name in names if name not in PEER_OF.values())
    }
    colours |= {load_baseline: colours[name] for name, load_baseline in PEER_OF.items() if name in colours}
    for panel, key, title in (
        (panels[0], "seconds", "forward and backward, seconds"),
        (panels[1], "mib", "peak memory, MiB (1 where less)"),
    ):
        floor = (
            1.0 if key == "mib" else 0.0
        )  # what is less than the memory in use before does not show, and a logarithm needs something
        for name in names:
            mine = [row for row in rows if row["what"] == name and key in row]
            style = "--" if any(row["peer"] for row in mine) else "-"
            panel.plot(
                [row["tokens"] for row in mine],
                [max(row[key], floor) for row in mine],
                style + "o",
                markersize=3,
                color=colours.get(name),
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
            mine = [row for row in errors if row["features"] == kind and row["deviation"] == deviation]
            panel.plot(
                [row["count"] for row in mine], [row["error"] for row in mine], marker="o", markersize=3, label=kind
            )
        title = (
            f"performer: relative error of softmax attention,\nentries of queries and keys of deviation {deviation:g}"
        )
        panel.set(title=title, xlabel="random features", xscale="log", yscale="log")
        panel.set_xticks(_FEATURES, list(map(str, _FEATURES)))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(picture, dpi=90)
    plt.close(figure)
