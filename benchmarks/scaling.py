"""How the time of our network grows with resolution, width, batch and transformer depth, and the fitted exponents.

One axis changes at a time; forward in inference mode and a training step (forward and backward), batch 1 unless that is
the axis, float32. Run: python benchmarks/scaling.py [--quick] [--only AXIS ...] [--json FILE] [--plot FILE]
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
from measure import Call, describe, fastest, gflop, machine, progress, table

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
    """What changes: an option of the network, or the size or number of its inputs."""

    values: tuple[int, ...]
    quick: tuple[int, ...]
    option: str | None = None
    fixed: dict[str, Any] = BASE


AXES = {
    "resolution": Axis((16, 32, 64, 128, 256), (16, 32, 64)),
    "width": Axis((32, 64, 128, 256), (32, 64, 128), "model_channels"),
    "batch": Axis((1, 2, 4, 8, 16, 32), (1, 2, 4)),
    "transformer depth": Axis((1, 2, 4, 8, 16), (1, 2, 4), "transformer_depth", BASE | TEXT),
}


def measure(name: str, axis: Axis, quick: bool, rounds: int) -> list[Row]:
    """One row for each value of the axis; all values are measured in the same rounds."""
    values = axis.quick if quick else axis.values
    steps: dict[str, Call] = {}
    rows, models = [], {}
    for value in values:
        model = UNet(**axis.fixed | ({axis.option: value} if axis.option else {}))  # zeros in weights cost the same
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
        rows.append({"axis": name, "value": value, "parameters": parameters, "gflop": operations(model, inputs)})
    seconds = fastest(steps, rounds, before=lambda step: models[step].zero_grad(set_to_none=True))
    progress(f"{name}, seconds:", seconds)
    return [row | {kind: seconds[f"{kind} {row['value']}"] for kind in ("forward", "train")} for row in rows]


def operations(model: UNet, inputs: list[torch.Tensor]) -> float:
    """GFLOP of a forward call with direct convolutions: those of a network without storage, which are torch's own."""
    with torch.device("meta"):
        twin = UNet.from_config(model.config)
    return gflop(lambda: twin(*(tensor.to("meta") for tensor in inputs)))


def exponent(xs: list[float], ys: list[float]) -> float:
    """The k of y = c x^k by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def fits(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Exponents of operations and times over all values, and over the last two."""
    keys = ("gflop", "forward", "train")
    spans = {"exponent": rows, "exponent, last two": rows[-2:]}
    return {
        span: {key: exponent([r["value"] for r in part], [r[key] for r in part]) for key in keys}
        for span, part in spans.items()
    }


def render(rows: list[Row]) -> str:
    """The table of one axis, the exponents below the values."""
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
    for span, found in fits(rows).items():
        body.append([span, "", *(f"{found[k]:.2f}" for k in ("gflop", "forward")), "", f"{found['train']:.2f}", ""])
    return f"### {name.capitalize()}\n\n{table(head, body)}"


def panel(rows: list[Row]) -> Panel:
    """The plot of one axis."""
    found = fits(rows)["exponent"]
    curves = {
        f"{label}: exponent {found[key]:.2f}": [(row["value"], row[key] * 1e3) for row in rows]
        for key, label in (("train", "training step"), ("forward", "forward"))
    }
    return Panel(rows[0]["axis"], "ms", curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--rounds", type=int, default=4, help="turns of every value (default: 4)")
    parser.add_argument("--quick", action="store_true", help="fewer values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG (docs/results/scaling.svg unless --quick)")
    options = parser.parse_args()
    about, command = machine(), f"python {shlex.join(sys.argv)}"
    print(describe(about, command), flush=True)
    axes = {}
    for name in options.only:
        axes[name] = measure(name, AXES[name], options.quick, options.rounds)
        print(f"\n{render(axes[name])}", flush=True)
    plot = options.plot or (None if options.quick else Path(__file__).parents[1] / "docs" / "results" / "scaling.svg")
    if plot:
        plot.write_text(draw([panel(rows) for rows in axes.values()]))
    if options.json:
        report = {"machine": about, "command": command, "axes": {n: {"rows": r, **fits(r)} for n, r in axes.items()}}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
