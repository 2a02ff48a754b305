"""The sweep of `speed.py --sweep`: ours beside diffusers in small networks, in as many cases as a given time allows."""

import argparse
import itertools
import random
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checks import find_wrong, gradient_errors, gradient_norm, relative_error
from diffusers import UNet2DConditionModel, UNet2DModel
from measure import START_SECONDS, Call, count_gflop, measure_peak, measure_seconds, print_progress
from sides import PRECISIONS, TEXT_BLOCKS, Network, as_sampled, list_sides, make_call, make_step, read, save
from torch import nn

Row = dict[str, Any]
MAX_RATIO = 1.03  # of ours to the best of diffusers; a case above it is measured again before it is reported
SIDES = list_sides(Network("diffusers", UNet2DModel, {}, ours={}), compiled=False)


class Case(NamedTuple):
    """One combination of the sweep; with text, the network has cross-attention to 77 tokens."""

    width: int
    size: int
    batch: int
    precision: str
    measure: str
    text: bool


def sweep(options: argparse.Namespace, report: Row, folder: Path) -> None:
    """Measure the cases in a random order, which is the same in every run, and add a row of each to the report.

    A case that is left out has a row too, with the reason. A case that would take more than a sixtieth of the time is
    left out. Once a case no longer fits into the time, so are all after it, so that the cut takes expensive and cheap
    cases alike.
    """
    end = START_SECONDS + 60 * options.minutes
    limit = report["limit"] = max(options.minutes, 5.0)
    axes = (options.widths, options.sizes, options.batches, options.precision, options.only, (False, True))
    cases = [Case(*values) for values in itertools.product(*axes)]
    random.Random(0).shuffle(cases)
    rates = {name: max(measure_peak(min_seconds(options), PRECISIONS[name]).values()) for name in options.precision}
    read_models = cache(lambda width, text, precision: make_models(width, text, precision, folder))
    is_over = False  # whether a case did not fit into the time
    for case in cases:
        seconds = estimate_seconds(case, rates[case.precision], options)
        is_over = is_over or (seconds <= limit and time.perf_counter() + seconds > end)
        row: Row = case._asdict() | {"estimate": seconds}
        if seconds > limit or is_over:
            row["left_out"] = "too long" if seconds > limit else "no time left"
        else:
            precision = case.precision if case.measure == "forward" else "float32"
            models = read_models(case.width, case.text, precision)
            peer = read_models(case.width, case.text, "float32")["diffusers"]
            row |= measure_case(case, models, peer, options)
        report["rows"].append(row)
    wrong = [row["wrong"] for row in report["rows"] if "wrong" in row]
    if wrong:
        raise SystemExit("\n".join(wrong))


def make_network(width: int, text: bool, size: int) -> Network:
    """Return a network of three levels; every attention head has 32 channels, whatever the width."""
    shared = {"block_out_channels": (width, 2 * width, 2 * width), "layers_per_block": 1}
    shared |= {"norm_num_groups": min(32, width // 4)}
    if text:
        heads = {"attention_head_dim": tuple(channels // 32 for channels in shared["block_out_channels"])}
        options = shared | heads | TEXT_BLOCKS | {"cross_attention_dim": 256, "sample_size": size}
        return Network("diffusers", UNet2DConditionModel, options, ours={}, channels=4, context_dim=256, size=size)
    options = shared | {"sample_size": size, "attention_head_dim": 32}
    options |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    options |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    return Network("diffusers", UNet2DModel, options, ours={}, size=size)


def make_models(width: int, text: bool, precision: str, folder: Path) -> dict[str, nn.Module]:
    """Return the models of all sides, whose convolutions take any size."""
    network, source = make_network(width, text, 32), folder / f"{width} {text}"
    if not source.exists():
        save(network, source)
    return {side: read(network, side, source, precision) for side in SIDES}


@cache
def count_case(width: int, size: int, text: bool) -> float:
    """Count the 10^9 operations of a forward call of one sample, without computing it."""
    network = make_network(width, text, size)
    with torch.device("meta"):
        model = network.build(**network.options)
        inputs = [torch.empty(1, network.channels, size, size), torch.zeros(1)]
        if network.context_dim:
            inputs.append(torch.empty(1, 77, network.context_dim))
        return count_gflop(lambda: model(*inputs))


def estimate_seconds(case: Case, rate: float, options: argparse.Namespace) -> float:
    """Estimate the time to measure a case, where calls reach a third of the machine's GFLOP/s and take 10 ms more."""
    passes = 3 if case.measure == "train" else 1
    seconds = 0.01 + count_case(case.width, case.size, case.text) * case.batch * passes / (rate / 3)
    checks = len(SIDES) * seconds + seconds
    return checks + len(SIDES) * count_rounds(seconds, options) * max(seconds, min_seconds(options))


def min_seconds(options: argparse.Namespace) -> float:
    """Return for how long a round repeats a short call."""
    return 0.001 if options.quick else 0.1


def count_rounds(seconds: float, options: argparse.Namespace) -> int:
    """Return the rounds for calls of so many seconds: as many as take a second, but two or more."""
    return min(options.rounds, max(2, round(1 / seconds)))


def measure_case(case: Case, models: dict[str, nn.Module], peer: nn.Module, options: argparse.Namespace) -> Row:
    """Return seconds and errors of all sides, and the ratio of ours to the best of the others."""
    name, is_training = format_case(case._asdict()), case.measure == "train"
    for model in (*models.values(), peer):
        model.train(is_training)
    before = (lambda side: models[side].zero_grad()) if is_training else str
    with torch.inference_mode(not is_training):
        start = time.perf_counter()
        calls, errors = prepare_calls(case, models if is_training else as_sampled(models), peer)
        rounds = count_rounds((time.perf_counter() - start) / (len(SIDES) + 1), options)
        if wrong := find_wrong(name, case.precision, errors):
            print_progress(wrong)
            return {"errors": errors, "wrong": wrong}
        seconds = measure_seconds(calls, rounds, before, min_seconds(options))
        first_ratio = divide(seconds)
        if first_ratio > MAX_RATIO:
            again = measure_seconds(calls, 3 * rounds, before, min_seconds(options))
            seconds = {side: min(value, again[side]) for side, value in seconds.items()}
    for model in models.values():
        model.zero_grad()
    ratio = divide(seconds)
    print_progress(f"{name}: {ratio:.3f} of the best; seconds:", seconds)
    return {"errors": errors, "seconds": seconds, "first_ratio": first_ratio, "ratio": ratio}


def prepare_calls(
    case: Case, models: dict[str, nn.Module], peer: nn.Module
) -> tuple[dict[str, Call], dict[str, float]]:
    """Return the calls to measure, and after a first call of each its error, from `peer` in float32."""
    network = make_network(case.width, case.text, case.size)
    calls = {side: make_call(network, side, models[side], case.batch) for side in SIDES}
    expected = make_call(network, "diffusers", peer, case.batch)
    if case.measure == "forward":
        output = expected()
        return calls, {side: relative_error(call(), output) for side, call in calls.items()}
    norm = gradient_norm(make_step(expected, "float32"), peer)
    steps = {side: make_step(call, case.precision) for side, call in calls.items()}
    return steps, gradient_errors(steps, models, norm)


def divide(seconds: dict[str, float]) -> float:
    """Return the seconds of ours over the fewest of the others."""
    return seconds["ours"] / min(value for side, value in seconds.items() if side != "ours")


def format_case(row: Row) -> str:
    """Return a case in words."""
    network = "text" if row["text"] else "plain"
    shape = f"width {row['width']}, {row['size']}x{row['size']}, batch {row['batch']}"
    return f"{network}, {shape}, {row['precision']}, {row['measure']}"
