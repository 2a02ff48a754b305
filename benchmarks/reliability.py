"""Kill trainings, draw networks, damage files and open hostile ones: what goes wrong?

    python benchmarks/reliability.py                 # 200 kills, 2,000 networks, 1,000 damages, all hostile files
    python benchmarks/reliability.py --seed 1 --kills 20 --networks 200 --damages 100

The tests run a short form of each part.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from measure import format_machine, format_table, read_machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import damage, hostile, kills
from support.network_draws import calls, check_batch_independence, check_gradients, check_saved_and_loaded, configs
from unet_denoiser import UNet

KILLS_A_RUN = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 200), ("networks", 2000), ("damages", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--part", choices=["kills", "networks", "damages", "hostile"], help="run this part alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(format_machine(read_machine(), "python benchmarks/reliability.py " + " ".join(sys.argv[1:])), flush=True)
    faults = 0
    for name, part in (
        ("kills", lambda folder: kill_trainings(folder, args.kills, args.seed)),
        ("networks", lambda folder: draw_networks(args.networks, args.seed)),
        ("damages", lambda folder: damage_files(folder, args.damages, args.seed)),
        ("hostile", open_hostile_files),
    ):
        if args.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                found = part(Path(folder))
                faults += found
                print(f"\n{name}: {found} faults, {time.perf_counter() - begun:.0f} s", flush=True)
    sys.exit(faults > 0)


def kill_trainings(folder: Path, count: int, draw_seed: int) -> int:
    """Kill trainings until there were `count` kills; each resumed training must end as one left alone, to the bit."""
    fell, faults = [], 0
    for i, start in enumerate(range(0, count, KILLS_A_RUN)):
        number, place = min(KILLS_A_RUN, count - start), folder / str(i)
        place.mkdir()
        try:
            fell += kills.run(place, number, steps=20 * number, longest=0.5, seed=draw_seed + i)
        except AssertionError as error:
            faults += 1
            print(f"training {i}: {error}")
    writing = sum(bool(leftovers) for _, leftovers in fell)
    print(f"\n{len(fell)} kills of {i + 1} trainings, {writing} of them while a file was being written")
    return faults


def draw_networks(count: int, draw_seed: int) -> int:
    """Draw `count` networks: forward, backward, save, load, and independence of the other samples of the batch."""
    drawn, faults = [], []

    @seed(draw_seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(calls(configs()))
    def check(call: tuple[UNet, dict[str, Any]]) -> None:
        model, arguments = call
        drawn.append(model.config)
        for holds in (check_batch_independence, check_saved_and_loaded, check_gradients):
            try:
                holds(model, arguments)
            except Exception as error:
                faults.append(f"{holds.__name__}: {error}; {model.config}")

    check()
    print("\n".join([f"\n{len(set(map(str, drawn)))} different networks of {len(drawn)}", *faults]))
    return len(faults)


def damage_files(folder: Path, count: int, draw_seed: int) -> int:
    """Damage model folders, runs and arrays `count` times; each is put right or refused in one line."""
    with silence():
        outcomes = damage.run(folder, count, draw_seed)
    results = ["refused", "equal", "warned", "as edited", "silent", "traceback"]
    counts = Counter((outcome.target, outcome.result) for outcome in outcomes)
    rows = [[name, *(str(counts[name, r]) for r in results)] for name in dict.fromkeys(o.target for o in outcomes)]
    print("\n" + format_table(["damaged", *results], rows))
    faults = [outcome for outcome in outcomes if outcome.result in ("silent", "traceback")]
    for fault in faults:
        print(f"{fault.result}: {fault.file}, {fault.damage}: {fault.message}")
    return len(faults)


def open_hostile_files(folder: Path) -> int:
    """Open hostile files, each in a process of its own."""
    outcomes = hostile.run(folder)
    faults = [outcome for outcome in outcomes if not outcome.is_refused]
    longest, largest = max(o.seconds for o in outcomes), max(o.peak for o in outcomes)
    print(f"\n{len(outcomes)} files; the longest took {longest:.1f} s, the largest {largest / 2**30:.2f} GiB")
    for fault in faults:
        last = (fault.said.strip().splitlines() or [""])[-1]
        print(f"{fault.name}: exit code {fault.code}, {fault.seconds:.1f} s, {fault.peak / 2**30:.2f} GiB: {last}")
    return len(faults)


@contextmanager
def silence() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


if __name__ == "__main__":
    main()
