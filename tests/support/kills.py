"""Kill a training with SIGKILL at random moments, resume it each time, and compare its end with an undisturbed one.

Every other step writes a checkpoint, so that many kills interrupt a write. By hand, run it with more kills than
`test_faults.py` has time for:

    python tests/support/kills.py 30
"""

import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from unet_denoiser import Run, UNet, load_data
from unet_denoiser.cli.app import main
from unet_denoiser.training.checkpoints import parse_step, read_checkpoint

NETWORK = ["--model.model-channels", "8", "--model.num-res-blocks", "1", "--model.channel-mult", "1"]
SAVING = ["--checkpoint-every", "2", "--preview-every", "1000", "--keep-best"]
OPTIONS = [*NETWORK, *SAVING, "--batch-size", "8", "--gradient-accumulation-steps", "2", "--num-workers", "2"]


def train(args, log):
    """Run the command in a copy of this process, which has everything imported already; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        main(["train", *map(str, args)])
        code = 0
    finally:
        os._exit(code)


def wait_for(names, child):
    """Wait until there is a new file, or the training has ended."""
    before = names()
    while not names() - before and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def check_readable(path):
    """Check that every file of a run can be read, whenever it was killed; return its latest step."""
    if not (path / "config.json").exists():
        return 0
    checkpoints = Run.load(path).checkpoints.paths()
    for file in checkpoints:
        tensors, metadata = read_checkpoint(file)
        assert metadata["step"] == parse_step(file)
        assert all(torch.isfinite(tensors[name]).all() for name in tensors)
    if (path / "model" / "model.safetensors").exists():
        UNet.from_pretrained(path / "model")
    return parse_step(checkpoints[-1]) if checkpoints else 0


def contents(path):
    """Return everything that two equal trainings have in common, bit for bit."""
    tensors, metadata = read_checkpoint(Run.load(path).checkpoints.find("latest"))
    metrics = re.sub(r', "data_wait": [0-9.]+', "", (path / "metrics.jsonl").read_text())
    weights = (path / "model" / "model.safetensors").read_bytes()
    return {name: tensors[name].numpy().tobytes() for name in tensors}, metadata, metrics, weights


def run(folder, kills, steps, longest, seed=0):
    """Train undisturbed, then with kills, each after at most `longest` seconds; return (step, leftovers) of each."""
    load_data("digits")  # imports what children then have
    draw, log, fell = random.Random(seed), folder / "log", []
    straight, killed = folder / "straight", folder / "killed"
    assert os.waitpid(train(["digits", "--out", straight, "--steps", steps, *OPTIONS], log), 0)[1] == 0, log.read_text()
    latest = 0
    while True:
        begun = (killed / "config.json").exists()
        start = ["--resume", killed] if begun else ["digits", "--out", killed, "--steps", steps, *OPTIONS]
        child = train(start, log)
        if len(fell) < kills:
            kind = draw.choice(["start", "anywhere", "writing", "writing"])
            if kind != "start":
                wait_for(lambda: {file.name for file in killed.glob("checkpoints/step-*")}, child)
            if kind == "writing":  # of a checkpoint or of the model, whose temporary file has just appeared
                wait_for(lambda: {file.name for file in killed.rglob(".*.safetensors.*.tmp")}, child)
            time.sleep(draw.uniform(0.0, 0.01 if kind == "writing" else longest))
            os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            assert len(fell) >= kills, f"finished after {len(fell)} kills; give it more steps"
            break
        assert len(fell) < kills, log.read_text()  # not by us
        leftovers = [file.name for file in killed.rglob(".*.tmp")] if killed.exists() else []
        before, latest = latest, check_readable(killed)
        assert latest >= before
        fell.append((latest, leftovers))
    assert contents(killed) == contents(straight)
    assert not list(killed.rglob(".*.tmp"))
    return fell


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        fell = run(Path(place), count, steps=count * 20, longest=0.5)
    writing = sum(bool(leftovers) for _, leftovers in fell)
    print(f"{len(fell)} kills, {writing} while a file was being written; steps then: {[step for step, _ in fell]}")
    print(f"the end equals the training left alone, to the bit; {time.perf_counter() - begun:.0f} s")
