"""The README beside an exported network: how to call it, and how to sample with it, without this package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unet_denoiser.config.export import ExportConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export.check import BOUNDS, CheckedCase
from unet_denoiser.export.network import InputSpec

_DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}


@dataclass(frozen=True)
class Subject:
    """The words of the README about a network.

    Args:
        name: of the run or model.
        class_names: in the order of the labels.
        text_encoder: folder or hub name of the model that makes `context`.
        vae: folder or hub name of the model that turns the samples into images.
        guidance_scale: of the sampling shown; 1 is off.
        negative: names of the conditions for which the example has what guidance leads away from.
    """

    name: str = "a network"
    class_names: Sequence[str] = ()
    text_encoder: str | None = None
    vae: str | None = None
    guidance_scale: float = 1.0
    negative: Sequence[str] = ()


def format_readme(
    subject: Subject,
    specs: Mapping[str, InputSpec],
    config: ExportConfig,
    checked: Sequence[CheckedCase],
    *,
    process: Diffusion,
    network: UNetConfig,
) -> str:
    """Return the text of README.md."""
    channels = process.data_channels(network)
    sections = [
        f"# {subject.name}, exported\n",
        "The U-Net of a diffusion model, for use without the code that trained it. Made by unet-denoiser.\n",
        _describe_files(config),
        "## Call it\n",
        f"```python\n{_call(specs, config)}```\n",
        _describe_inputs(specs, channels, process),
        "## Sample with it\n",
        _describe_sampling(subject, process),
        f"```python\n{_sample(subject, specs, process, channels)}```\n",
        "## Check\n",
        _describe_check(checked, config),
    ]
    return "\n".join(section for section in sections if section)


def _describe_files(config: ExportConfig) -> str:
    files = {"onnx": "`network.onnx`", "openvino": "`network.xml` and `network.bin`", "torch": "`network.pt2`"}
    return (
        f"{files[config.to]}: the network, in {config.precision}. `schedule.json`: its noise levels. `example.npz`:\n"
        "the inputs of one call, and the output that the original network has for them.\n"
    )


def _call(specs: Mapping[str, InputSpec], config: ExportConfig) -> str:
    """Return the code that defines `network` and calls it once."""
    if config.to == "onnx":
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("network.onnx")',
        ]
        body = ["    return session.run(None, inputs)[0]"]
    elif config.to == "openvino":
        lines = ["import numpy as np", "import openvino", ""]
        lines += ['example = dict(np.load("example.npz"))', 'model = openvino.Core().read_model("network.xml")']
        if any(isinstance(axis, str) for spec in specs.values() for axis in spec.shape):
            names = "[i.any_name for i in model.inputs]"
            lines += [f"model.reshape({{name: list(example[name].shape) for name in {names}}})  # else slow"]
        lines += ['compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})']
        body = ["    return compiled(inputs)[0]"]
    else:
        lines = ["import numpy as np", "import torch", "", 'program = torch.export.load("network.pt2").module()']
        lines += [f"names = {list(specs)!r}".replace("'", '"')]
        body = ["    with torch.no_grad():"]
        body += ["        return program(*(torch.from_numpy(inputs[name]) for name in names)).numpy()"]
    lines += [] if config.to == "openvino" else ['example = dict(np.load("example.npz"))']
    lines += ['expected = example.pop("output")', "", "", "def network(**inputs):", *body, "", ""]
    lines += [f"inputs = {{name: example[name] for name in {list(specs)!r}}}".replace("'", '"')]
    lines += ['print("largest difference:", np.abs(network(**inputs) - expected).max())']
    return "\n".join(lines) + "\n"


def _describe_inputs(specs: Mapping[str, InputSpec], channels: int, process: Diffusion) -> str:
    rows = ["| input | dtype | shape | |", "|---|---|---|---|"]
    for name, spec in specs.items():
        rows.append(f"| `{name}` | {_DTYPES[spec.dtype]} | ({', '.join(map(str, spec.shape))}) | {spec.meaning} |")
    more = (
        f"; its first {channels} channels are the prediction, the others a variance" if process.learns_variance else ""
    )
    rows.append(f"\nThe output is float32, of the size of `x`{more}.\n")
    return "\n".join(rows)


def _describe_sampling(subject: Subject, process: Diffusion) -> str:
    text = "This goes on after the code above: ddim, "
    if process.distillation is not None:
        text += f"in the steps that the network was distilled for ({process.distillation.describe_steps()})"
    else:
        count = process.num_train_timesteps
        text += "in the steps that `schedule.json` names. Others can be taken: for n steps\n"
        text += f"`steps = (np.round({count} - np.arange(n) * {count} / n) - 1).astype(int)`"
    text += ".\n"
    if subject.class_names:
        text += f"Classes, in the order of their labels: {', '.join(subject.class_names)}.\n"
    if subject.text_encoder:
        text += f"`context` holds the tokens that the text encoder {subject.text_encoder} makes of captions.\n"
    if subject.vae:
        text += f"The samples are latents, which the autoencoder {subject.vae} decodes.\n"
    return text


def _sample(subject: Subject, specs: Mapping[str, InputSpec], process: Diffusion, channels: int) -> str:
    """Return the code of a sampling, which goes on after that of `_call`."""
    given = [name for name in specs if name not in ("x", "t", "x0_estimate")]
    dropped = [name for name in given if name.startswith("drop_")]
    guided = bool(dropped or subject.negative) and process.distillation is None
    rules, part = process.step_rules, f"[:, :{channels}]" if process.learns_variance else ""
    lines = ["import json", "", 'schedule = json.load(open("schedule.json"))']
    lines += ['levels, steps = schedule["levels"], schedule["steps"]']
    if given:
        lines += [f"conditions = {{name: example[name] for name in {given!r}}}".replace("'", '"')]
    if "time_cond" in specs and process.distillation is not None and process.distillation.draws_guidance:
        scale, dim = process.sampling_defaults["guidance_scale"], specs["time_cond"].shape[1]
        lines += [f"guidance_scale, half = {scale:g}, {int(dim) // 2}"]
        lines += ["angles = 1000 * (guidance_scale - 1) * np.exp(-np.log(10000) * np.arange(half) / (half - 1))"]
        lines += ["embedded = np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)"]
        lines += ['conditions["time_cond"] = np.tile(embedded, (len(example["x"]), 1))']
    if guided:
        lines += [f"guidance_scale = {subject.guidance_scale:g}  # 1 is off"]
        others = [f'"{n}": np.ones_like(example["{n}"])' for n in dropped]
        others += [f'"{n}": example["negative_{n}"]' for n in subject.negative]
        lines += [f"reference = conditions | {{{', '.join(others)}}}  # what guidance leads away from"]
    lines += ['x = np.random.default_rng(0).standard_normal(example["x"].shape).astype(np.float32)']
    lines += ["estimate = np.zeros_like(x)"] if "x0_estimate" in specs else []
    last = "0" if rules.ends_noisy else "None"
    lines += [f"for k, after in zip(steps, [*steps[1:], {last}]):"]
    lines += ['    alpha, sigma, c_skip, c_out = (levels[name][k] for name in ("alpha", "sigma", "c_skip", "c_out"))']
    estimate = ', "x0_estimate": estimate' if "x0_estimate" in specs else ""
    lines += ['    time = np.full(len(x), levels["time"][k], np.float32)']
    lines += [f'    inputs = {{"x": levels["c_in"][k] * x, "t": time{estimate}}}']
    lines += [f"    output = network(**inputs{', **conditions' if given else ''}){part}"]
    if guided:
        lines += ["    if guidance_scale != 1:"]
        lines += [f"        base = network(**inputs, **reference){part}"]
        lines += ["        output = base + guidance_scale * (output - base)"]
    lines += ["    x0 = c_skip * x + c_out * output"]
    clip = ['    if schedule["data_range"]:', '        x0 = x0.clip(*schedule["data_range"])']
    noise = ["    noise = (x - alpha * x0) / sigma"]
    lines += [*noise, *clip] if rules.keeps_noise else [*clip, *noise]
    if "x0_estimate" in specs:
        bounds = process.data_range
        lines += ["    estimate = x0" if bounds is None else f"    estimate = x0.clip({bounds[0]:g}, {bounds[1]:g})"]
    lines += ["    if after is not None:"] * (last == "None")
    indent = "        " if last == "None" else "    "
    lines += [f'{indent}x = levels["alpha"][after] * x0 + levels["sigma"][after] * noise']
    result = "x0" if last == "None" else "x"
    lines += [f'np.save("samples.npy", {result})  # in [-1, 1]'.replace("  # in [-1, 1]", "")]
    return "\n".join(lines) + "\n"


def _describe_check(checked: Sequence[CheckedCase], config: ExportConfig) -> str:
    worst = max(case.error for case in checked)
    rows = ["| size | batch | " + " | ".join(f"t = {k}" for k in _levels(checked)) + " |"]
    rows += ["|---|--:|" + "--:|" * len(_levels(checked))]
    for batch, size in dict.fromkeys((case.batch, case.size) for case in checked):
        errors = [f"{case.error:.1e}" for case in checked if (case.batch, case.size) == (batch, size)]
        rows.append(f"| {'x'.join(map(str, size))} | {batch} | {' | '.join(errors)} |")
    return (
        "The file's output was compared with the original network's before it was put here. Its error is at most\n"
        f"{worst:.1e} of the output (root mean squares; {BOUNDS[config.precision]:g} is accepted in "
        f"{config.precision}):\n\n" + "\n".join(rows) + "\n"
    )


def _levels(checked: Sequence[CheckedCase]) -> list[int]:
    return list(dict.fromkeys(case.timestep for case in checked))
