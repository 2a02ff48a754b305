"""The tables that `speed.py` prints."""

from typing import Any

from measure import format_machine, format_table

Row = dict[str, Any]
MIB = 2**20
HEADS = {"forward": ("forward", "ms"), "train": ("step", "ms"), "retained": ("kept", "MiB"), "memory": ("peak", "MiB")}
COLUMNS = """The number in a column's head is the batch size. Forward: a call in inference mode. Step: forward and
backward in training mode. Kept: memory that the forward call saves for the backward one. Peak: memory that a step adds
to the resident memory. Percentages count the operations of direct convolutions; methods with fewer can pass 100%."""


def format_report(report: Row) -> str:
    """Return all tables as markdown; times with their share of the machine's peak."""
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in report["peak"].items())
    peak = max(report["peak"].values())
    parts = [format_machine(report["machine"], report["command"])]
    parts.append(f"Machine's peak, float32 GFLOP/s: {peaks}. Percentages are of the larger one, {peak:.0f}.")
    timed = [row for row in report["rows"] if "network" in row]
    if timed:
        parts.append(COLUMNS)
    for name in dict.fromkeys(row["network"] for row in timed):
        parts.append(format_network([row for row in timed if row["network"] == name], peak))
    for measure, format_rows in (("startup", format_startup), ("load", format_load)):
        if rows := [row for row in report["rows"] if row["measure"] == measure]:
            parts.append(format_rows(rows))
    return "\n\n".join(parts)


def format_network(rows: list[Row], peak: float) -> str:
    """Return the table of one network: a row for each side, a column for each measure and batch size."""
    first = rows[0]
    columns = list(dict.fromkeys((row["measure"], row["batch"]) for row in rows))
    cells = {(row["side"], row["measure"], row["batch"]): format_cell(row, peak) for row in rows}
    head = [f"{HEADS[measure][0]} {batch}, {HEADS[measure][1]}" for measure, batch in columns]
    sides = dict.fromkeys(row["side"] for row in rows)
    body = [[side, *(cells.get((side, *column), "") for column in columns)] for side in sides]
    parts = [f"### {first['network']}: {first['parameters']:,} parameters, {first['gflop']:.2f} GFLOP a sample"]
    if "ours" not in sides:
        parts.append("Ours cannot build this network: compare the percentages alone.")
    parts.append(format_table(["side", *head], body))
    if errors := [row["error"] for row in rows if "error" in row]:
        parts.append(f"Largest difference between the sides' outputs: {max(errors):.1e} of the largest value.")
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
