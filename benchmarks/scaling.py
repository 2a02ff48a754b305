"""Time of our network over resolution, width, batch size and transformer depth, with fitted exponents.

One axis changes at a time. A forward call in inference mode and a training step (forward and backward) are measured, in
float32, with batch size 1 unless that is the axis.

Run: python benchmarks/scaling.py [--quick] [--only AXIS ...] [--json FILE] [--plot FILE]
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loglog import Panel, draw
from measure import Call, count_gflop, format_machine, format_table, measure_seconds, print_progress, read_machine

from unet_denoiser import UNet

Row = dict[str, Any]
BASE: dict[str, Any] = {
    "model_channels": 64,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),  # the bottleneck has it always
    "num_heads": None,
    "head_dim": 32,
    "context_dim": None,
    "image_size": 32,
    "upsample": "nearest",
    "norm_groups": 16,
    "dropout": 0.0,
}
TEXT: dict[str, Any] = {"attention": "transformer", "attention_resolutions": (16, 8), "context_dim": 256}


class Axis(NamedTuple):
    """An option of the network, or the size or number of its inputs, and its values."""

    values: tuple[int, ...]
    quick: tuple[int, ...]
    option: str | None = None
    fixed: dict[str, Any] = BASE  # the other options


AXES = {
    "resolution": Axis((16, 32, 64, 128, 256), (16, 32, 64)),
    "width": Axis((32, 64, 128, 256), (32, 64, 128), "model_channels"),
    "batch": Axis((1, 2, 4, 8, 16, 32), (1, 2, 4)),
    "transformer depth": Axis((1, 2, 4, 8, 16), (1, 2, 4), "transformer_depth", BASE | TEXT),
}


def measure_axis(name: str, axis: Axis, quick: bool, rounds: int) -> list[Row]:
    """Return a row for each value of the axis; all values are measured in the same rounds."""
    values = axis.quick if quick else axis.values
    steps: dict[str, Call] = {}
    rows, models = [], {}
    for value in values:
        model = UNet(
            **axis.fixed | ({axis.option: value} if axis.option else {})
        )  # the time does not depend on the weights
        size, batch = value if name == "resolution" else 32, value if name == "batch" else 1
        inputs = [torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))]
        if model.config.context_dim:
            inputs.append(torch.randn(batch, 77, model.config.context_dim))

        def forward(model: UNet = model, inputs: list[torch.Tensor] = inputs) -> torch.Tensor:
            return model(*inputs)

        def without_gradient(forward: Call = forward) -> None:
            with torch.inference_mode():
                forward()

        def train(forward: Call = forward) -> None:
            forward().square().mean().backward()

        for kind, step in (("forward", without_gradient), ("train", train)):
            step()
            steps[f"{kind} {value}"], models[f"{kind} {value}"] = step, model
        parameters = sum(p.numel() for p in model.parameters())
        rows.append({"axis": name, "value": value, "parameters": parameters, "gflop": count_forward(model, inputs)})
    seconds = measure_seconds(steps, rounds, before=lambda step: models[step].zero_grad(set_to_none=True))
    print_progress(f"{name}, seconds:", seconds)
    return [row | {kind: seconds[f"{kind} {row['value']}"] for kind in ("forward", "train")} for row in rows]


def count_forward(model: UNet, inputs: list[torch.Tensor]) -> float:
    """Count the GFLOP of a forward call with direct convolutions, which a network on the meta device has."""
    with torch.device("meta"):
        twin = UNet.from_config(model.config)
    return count_gflop(lambda: twin(*(tensor.to("meta") for tensor in inputs)))


def fit_exponent(xs: list[float], ys: list[float]) -> float:
    """Fit k of y = c x^k by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def fit_exponents(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Fit the exponents of operations and times over all values, and over the last two."""
    keys = ("gflop", "forward", "train")
    spans = {"exponent": rows, "exponent, last two": rows[-2:]}
    return {
        span: {key: fit_exponent([r["value"] for r in part], [r[key] for r in part]) for key in keys}
        for span, part in spans.items()
    }


def format_axis(rows: list[Row]) -> str:
    """Return the table of one axis, with the exponents below the values."""
    name = rows[0]["axis"]
    head = [name, "parameters", "GFLOP forward", "forward, ms", "GFLOP/s", "training step, ms", "GFLOP/s"]
    body = [
        [
            str(row["value"]),
            f"{row['parameters']:,}",
            f"{row['gflop']:.2f}",
            *(f"{row['forward'] * 1e3:.1f}", f"{row['gflop'] / row['forward']:.0f}"),
            *(f"{row['train'] * 1e3:.1f}", f"{3 * row['gflop'] / row['train']:.0f}"),
        ]
        for row in rows
    ]
    for span, found in fit_exponents(rows).items():
        body.append([span, "", *(f"{found[k]:.2f}" for k in ("gflop", "forward")), "", f"{found['train']:.2f}", ""])
    return f"### {name.capitalize()}\n\n{format_table(head, body)}"


def make_panel(rows: list[Row]) -> Panel:
    """Return the plot of one axis."""
    found = fit_exponents(rows)["exponent"]
    curves = {
        f"{label}: exponent {found[key]:.2f}": [(row["value"], row[key] * 1e3) for row in rows]
        for key, label in (("train", "training step"), ("forward", "forward"))
    }
    return Panel(rows[0]["axis"], "ms", curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--rounds", type=int, default=4, help="measurements of every value, in turn (default: 4)")
    parser.add_argument("--quick", action="store_true", help="fewer values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG (docs/results/scaling.svg unless --quick)")
    options = parser.parse_args()
    about, command = read_machine(), f"python {shlex.join(sys.argv)}"
    print(format_machine(about, command), flush=True)
    axes = {}
    for name in options.only:
        axes[name] = measure_axis(name, AXES[name], options.quick, options.rounds)
        print(f"\n{format_axis(axes[name])}", flush=True)
    plot = options.plot or (None if options.quick else Path(__file__).parents[1] / "docs" / "results" / "scaling.svg")
    if plot:
        plot.write_text(draw([make_panel(rows) for rows in axes.values()]))
    if options.json:
        report = {
            "machine": about,
            "command": command,
            "axes": {n: {"rows": r, **fit_exponents(r)} for n, r in axes.items()},
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
