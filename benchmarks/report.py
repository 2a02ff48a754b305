"""The tables that `speed.py` prints."""

import math
import statistics
from collections import Counter
from typing import Any

from measure import format_machine, format_table
from sweep import MAX_RATIO, format_case

Row = dict[str, Any]
MIB = 2**20
HEADS = {"forward": ("forward", "ms"), "train": ("step", "ms"), "retained": ("kept", "MiB"), "memory": ("peak", "MiB")}
COLUMNS = """The number in a column's head is the batch size. Forward: a call in inference mode. Step: forward and
backward in training mode. Kept: memory that the forward call saves for the backward one. Peak: memory that a step adds
to the resident memory. Percentages count the operations of direct convolutions; methods with fewer can pass 100%.
bfloat16: weights and inputs of a forward call; a step is under autocast, with weights in float32. guided-diffusion and
denoising-diffusion-pytorch have no forward call in bfloat16, because parts of them compute in float32 alone."""

SWEEP = f"""Ratio: the time of ours over that of the best of diffusers. A ratio over {MAX_RATIO} was measured again with
three times as many rounds, and the fastest of all rounds counts. Cases that would take long are left out."""


def format_report(report: Row) -> str:
    """Return all tables as markdown; times with their share of the machine's peak."""
    parts = [format_machine(report["machine"], report["command"])]
    for precision, peaks in report["peak"].items():
        listed = ", ".join(f"{name} {value:.0f}" for name, value in peaks.items())
        parts.append(f"Machine's peak in {precision}, GFLOP/s: {listed}. Percentages are of the larger one.")
    timed = [row for row in report["rows"] if "network" in row]
    if timed:
        parts.append(COLUMNS)
    for table in dict.fromkeys((row["network"], row["precision"]) for row in timed):
        peak = max(report["peak"][table[1]].values())
        parts.append(format_network([row for row in timed if (row["network"], row["precision"]) == table], peak))
    for measure, format_rows in (("startup", format_startup), ("load", format_load)):
        if rows := [row for row in report["rows"] if row["measure"] == measure]:
            parts.append(format_rows(rows))
    return "\n\n".join(parts)


def format_network(rows: list[Row], peak: float) -> str:
    """Return the table of one network in one precision: rows are sides, columns measures and batch sizes."""
    first = rows[0]
    columns = list(dict.fromkeys((row["measure"], row["batch"]) for row in rows))
    cells = {(row["side"], row["measure"], row["batch"]): format_cell(row, peak) for row in rows}
    head = [f"{HEADS[measure][0]} {batch}, {HEADS[measure][1]}" for measure, batch in columns]
    sides = dict.fromkeys(row["side"] for row in rows)
    body = [[side, *(cells.get((side, *column), "") for column in columns)] for side in sides]
    about = f"{first['parameters']:,} parameters, {first['gflop']:.2f} GFLOP a sample"
    parts = [f"### {first['network']}, {first['precision']}: {about}"]
    if "ours" not in sides:
        parts.append("Ours cannot build this network: compare the percentages alone.")
    parts.append(format_table(["side", *head], body))
    if errors := [row["error"] for row in rows if "error" in row]:
        parts.append(f"Largest difference from the peer's output in float32: {max(errors):.1e} of the largest value.")
    return "\n\n".join(parts)


def format_cell(row: Row, peak: float) -> str:
    """Return milliseconds with the share of the peak, or MiB; a training step counts as three forward calls."""
    if "failed" in row:
        return "fails"
    if "bytes" in row:
        return f"{row['bytes'] / MIB:.0f}"
    work = row["gflop"] * row["batch"] * (3 if row["measure"] == "train" else 1)
    return f"{row['seconds'] * 1e3:.1f} ({work / row['seconds'] / peak:.0%})"


def format_startup(rows: list[Row]) -> str:
    """Return the table of import and construction."""
    body = [
        [
            row["side"],
            *(f"{row[key]:.2f}" for key in ("import_s", "build_s", "total_s")),
            f"{row['resident'] / MIB:.0f}",
            f"{row['parameters']:,}",
        ]
        for row in rows
    ]
    head = ["side", "import, s", "build, s", "both, s", "resident, MiB", "parameters"]
    return f"### Start-up: import the library and build DDPM's network for CIFAR-10\n\n{format_table(head, body)}"


def format_load(rows: list[Row]) -> str:
    """Return the table of construction with weights; memory in multiples of the file."""
    size, parameters = rows[0]["file"], rows[0]["parameters"]
    body = [
        [
            row["side"],
            *(f"{row[key]:.2f}" for key in ("load_s", "touched_s")),
            *(f"{row[key] / size:.2f}" for key in ("load_peak", "touched_peak", "private")),
        ]
        for row in rows
    ]
    head = ["side", "load, s", "load and touch, s", "peak after load", "peak after touch", "of it private"]
    title = f"### Load: {parameters:,} parameters from {size / 2**30:.2f} GiB of safetensors"
    return f"{title}; resident memory in multiples of the file\n\n{format_table(head, body)}"


def format_sweep(report: Row) -> str:
    """Return the sweep's tables: the worst cases, how the ratios spread along each axis, and what was left out."""
    rows = [row for row in report["rows"] if "ratio" in row]
    parts = [format_machine(report["machine"], report["command"])]
    parts.append(f"### Sweep: {len(rows)} of {len(report['rows'])} cases measured")
    parts.append(SWEEP)
    if rows:
        parts += [format_worst(rows), format_spread(rows)]
    return "\n\n".join([*parts, *format_left_out(report)])


def format_worst(rows: list[Row], count: int = 10) -> str:
    """Return the table of the cases where ours takes longest beside the best of the others."""
    worst = sorted(rows, key=lambda row: row["ratio"], reverse=True)[:count]
    sides = list(rows[0]["seconds"])
    body = [
        [format_case(row), *(f"{row['seconds'][side] * 1e3:.2f}" for side in sides), f"{row['ratio']:.3f}"]
        for row in worst
    ]
    return f"The worst {len(worst)}:\n\n" + format_table(["case", *(f"{side}, ms" for side in sides), "ratio"], body)


def format_spread(rows: list[Row]) -> str:
    """Return the table of the ratios' distribution: of all cases, and of those with one value on an axis."""
    groups = {"all": rows}
    for axis in ("precision", "measure", "text", "width", "size", "batch"):
        for value in sorted({row[axis] for row in rows}):
            groups[f"{axis} {value}"] = [row for row in rows if row[axis] == value]
    body = []
    for name, group in groups.items():
        ratios = sorted(row["ratio"] for row in group)
        over = sum(ratio > MAX_RATIO for ratio in ratios)
        shown = (statistics.median(ratios), ratios[math.ceil(0.9 * len(ratios)) - 1], ratios[-1])
        body.append([name, str(len(ratios)), *(f"{ratio:.3f}" for ratio in shown), str(over)])
    return format_table(["ratios of", "cases", "median", "90 %", "worst", f"over {MAX_RATIO}"], body)


def format_left_out(report: Row) -> list[str]:
    """Return the cases that were stopped, and a table of how many were measured and left out."""
    rows = report["rows"]
    counts = Counter((row["width"], row["size"], row.get("left_out")) for row in rows)
    widths, sizes = (sorted({row[axis] for row in rows}) for axis in ("width", "size"))
    body = [
        [f"width {width}", *(f"{counts[width, size, None]} ({counts[width, size, 'too long']})" for size in sizes)]
        for width in widths
    ]
    long, late = (sum(row.get("left_out") == reason for row in rows) for reason in ("too long", "no time left"))
    text = f"""Cases measured, and in brackets the {long} that were left out because each would take more than
{report["limit"]:.0f} s. {late} more were left out because the time was over."""
    wrong = [row["wrong"] for row in rows if "wrong" in row]
    return [text, format_table(["", *(f"{size}x{size}" for size in sizes)], body), *wrong]
