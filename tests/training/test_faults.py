"""Faults in a training: kills, signals, full and read-only disks, NaN and infinity."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import kills, slow_training
from support.trainings import make_run, make_trainer, steps_kept, two_classes, weights, without_times
from unet_denoiser import ArrayDataset, DataConfig, Diffusion, Run
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.training.checkpoints import Checkpoints, read_checkpoint, select_averages
from unet_denoiser.training.loop import load_trainer, save, train
from unet_denoiser.training.tracking import MetricsLog
from unet_denoiser.utils.files import check_writable, write_atomically
from unet_denoiser.utils.finite import NonFiniteError, first_nonfinite_module
from unet_denoiser.utils.signals import watch_signals
from unet_denoiser.utils.tensor_files import write_safetensors


def test_kills_at_random_moments_change_nothing(tmp_path):
    fell = kills.run(tmp_path, kills=4, steps=80, longest=0.4)
    assert len(fell) == 4
    assert fell[-1][0] > 0  # the latest checkpoint then


def start(tmp_path, *options, limit=None):
    """Start the command in a new process; return that once it has written its first checkpoint."""
    command = [sys.executable, "-m", "unet_denoiser", "train", "digits", "--out", "run", "--steps", "100000"]
    limits = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes |= {"cwd": tmp_path, "preexec_fn": limits, "start_new_session": True}
    process = subprocess.Popen([*command, *kills.NETWORK, *options], **pipes)
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/step-*")) and limit is None:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_write_a_checkpoint_and_end(tmp_path, number, code):
    """Sent to the workers as well, as a terminal and a job scheduler do."""
    process = start(tmp_path, "--num-workers", "2")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    message = errors.splitlines()[-1]
    assert message.startswith(f"unet-denoiser: run: stopped by {number.name} after step ")
    step = int(message.split("after step ")[1].split(",")[0])
    assert steps_kept(Run.load(tmp_path / "run"))[-1] == step
    assert message.endswith("to go on: unet-denoiser train --resume run")


def test_a_full_disk_is_one_line_and_changes_no_file(tmp_path):
    """Files may not grow beyond 64 KiB, less than a checkpoint: the system refuses the write, as a full disk does."""
    process = start(tmp_path, limit=2**16)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.splitlines()[-1].startswith("unet-denoiser: error: ")
    assert "cannot be written" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()} == {".lock", "config.json", "metrics.jsonl"}


def test_disk_errors_name_the_path(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/weights'"):
        write_atomically(tmp_path / "weights", fail)
    assert not list(tmp_path.iterdir())


def test_unwritable_folders_are_refused_beforehand(tmp_path):
    check_writable(tmp_path / "new" / "newer")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"/file: no file can be made in it: Not a directory"):
        check_writable(tmp_path / "file" / "new")


def test_one_process_trains_in_a_directory(tmp_path):
    trainer = make_trainer({"steps": 3})
    run = Run(tmp_path, DataConfig("two"), trainer.model.config, trainer.process, trainer.config)
    steps = train(run, trainer)
    next(steps)
    with pytest.raises(ValueError, match="another process trains in it"):
        next(train(run.with_training(steps=9), make_trainer({"steps": 9})))
    assert Run.load(tmp_path).training.steps == 3  # what was refused has changed nothing
    assert [step.step for step in steps] == [2, 3]
    assert not list(train(run, trainer))


# ---- not finite ------------------------------------------------------------------------------------------------------


class Poisoned(ArrayDataset):
    """Two classes with some images of NaN."""

    def __init__(self, bad):
        data = two_classes()
        super().__init__(data.images.numpy(), data.labels.numpy())
        self.bad = bad

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"image": item["image"] * float("nan")} if index in self.bad else item


def test_a_bad_step_changes_nothing_and_is_counted():
    trainer = make_trainer({"steps": 8}, process=Diffusion(clip_sample_range=None), data=Poisoned({5}))
    before, skipped = weights(trainer.model), []
    for step in trainer.steps():
        after = weights(trainer.model)
        same = all(torch.equal(after[name], before[name]) for name in after)
        assert same == step.skipped == (not bool(torch.isfinite(step.loss)))
        skipped.append(step.skipped)
        before = after
    assert sum(skipped) == trainer.skipped_steps == 2  # once an epoch of four steps
    assert trainer.ema.updates == 6
    assert all(torch.isfinite(p).all() for p in before.values())


def test_training_stops_and_names_the_batch():
    options = {"max_bad_steps": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer(options, process=Diffusion(clip_sample_range=None), data=Poisoned(set(range(32))))
    with pytest.raises(NonFiniteError) as caught:
        list(trainer.steps())
    message = str(caught.value)
    assert message.startswith(
        "3 steps in a row were not finite, the last of them step 3; first: the output of input_conv"
    )
    first = np.random.default_rng([0, 0, 0]).permutation(32)[16:20]
    assert f"samples {', '.join(map(str, first))} of the data" in message


def test_the_first_bad_module_is_the_innermost():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)))
    assert first_nonfinite_module(net, lambda: net(torch.ones(1, 2))) is None
    net[1][1].weight.data[0, 0] = float("inf")
    assert first_nonfinite_module(net, lambda: net(torch.ones(1, 2))).startswith(
        "the output of 1.1 (Linear) from finite"
    )


def test_bad_gradients_are_named():
    trainer = make_trainer({"max_bad_steps": 1})
    trainer.model.output[0].weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"first: the gradient of output.0.weight"):
        list(trainer.steps())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = make_trainer()
    run = Run(tmp_path, DataConfig("two"), trainer.model.config, trainer.process, trainer.config)
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 1000)
    next(trainer.steps())
    save(run, trainer, metrics)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    trainer.step = 2
    trainer.model.input_conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model.input_conv.weight is not finite"):
        save(run, trainer, metrics)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_prune_keeps_the_last_the_best_and_every_nth(tmp_path):
    checkpoints, config = Checkpoints(tmp_path), TrainingConfig(keep_last=2, keep_every=4, keep_best=True)
    for step, loss in enumerate([5.0, 4.0, 1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0], start=1):
        checkpoints.write({"x": torch.ones(1) * step}, {"step": step, "smoothed_loss": loss})
        checkpoints.prune(config)
    assert [path.name[5:13] for path in checkpoints.paths()] == ["00000003", "00000004", "00000008", "00000009"]
    assert read_checkpoint(checkpoints.find("best"))[1]["step"] == 3
    assert read_checkpoint(checkpoints.find("latest"))[0]["x"] == 9
    with pytest.raises(FileNotFoundError, match=r"checkpoint='7' is not in .*; there: 3, 4, 8, 9, latest, best"):
        checkpoints.find("7")


def test_verify_finds_a_damaged_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    tensors, metadata = {"x": torch.ones(3)}, {"step": 1}
    path = checkpoints.write(tensors, metadata)
    checkpoints.verify(path, tensors, metadata)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="does not read back"):
        checkpoints.verify(path, tensors, metadata)


def test_a_checkpoint_of_the_run_can_be_loaded_by_its_step(tmp_path):
    trainer = make_trainer({"steps": 4, "checkpoint_every": 1, "keep_last": 9})
    run = Run(tmp_path, DataConfig("two"), trainer.model.config, trainer.process, trainer.config)
    for step in train(run, trainer):
        if step.step == 2:
            expected = {name: a.clone() for name, a in trainer.ema.averages().items()}
    found = run.load_model("2").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bf16_computes_embeddings_and_loss_in_float32():
    trainer = make_trainer({"mixed_precision": "bf16", "steps": 3})
    seen = {}
    trainer.model.time_mlp.register_forward_hook(lambda m, args, out: seen.update(emb=out.dtype))
    trainer.model.encoder[0][0].conv1.register_forward_hook(lambda m, args, out: seen.update(conv=out.dtype))
    losses = [float(step.loss) for step in trainer.steps()]
    assert seen == {"emb": torch.float32, "conv": torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses == pytest.approx([float(step.loss) for step in make_trainer({"steps": 3}).steps()], rel=0.02)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="mixed_precision='fp16' needs a CUDA GPU"):
            make_trainer({"mixed_precision": "fp16"})


# ---- stopping --------------------------------------------------------------------------------------------------------


def start_slow(folder, method, kind, seconds, *options):
    folder.mkdir()
    script = str(Path(slow_training.__file__))
    command = [sys.executable, script, method, kind, str(seconds), "digits", "--out", "run", "--steps", "50"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += ["--num-workers", "2", *kills.NETWORK, *options]
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)


def left_in_group(group):
    """Return the processes of a group that are left, without those that nobody has waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(its_group) == group and state != "Z")
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_stopping_is_safe_however_long_a_step_takes(tmp_path):
    """Signals to the whole group while a step takes 15 seconds, or a preview 25; all trainings at once."""
    options = {"fork": ("fork", "step", 15), "forkserver": ("forkserver", "step", 15), "again": ("fork", "step", 15)}
    options |= {"killed": ("spawn", "step", 15), "preview": ("fork", "preview", 1, "--preview-every", "2")}
    running = {name: start_slow(tmp_path / name, *args) for name, args in options.items()}
    for name, process in running.items():
        while process.poll() is None and not (tmp_path / name / "slow").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        assert len(left_in_group(process.pid)) >= 3
        os.killpg(process.pid, signal.SIGTERM) if name != "killed" else process.kill()
        if name == "again":  # here, since the others may take longer to start than its step
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=10) == 143
    steps = {"fork": 2, "forkserver": 2, "preview": 2, "again": 1, "killed": 1}
    for name, process in running.items():
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == (-9 if name == "killed" else 143)
        assert "Traceback" not in errors
        assert steps_kept(Run.load(tmp_path / name / "run"))[-1] == steps[name]
        assert name in ("again", "killed") or f"stopped by SIGTERM after step {steps[name]}, with" in errors
        end = time.monotonic() + 10
        while left_in_group(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left_in_group(process.pid)
    for name in ("fork", "forkserver"):  # the step was not cut short
        written = (tmp_path / name / "run" / "checkpoints" / "step-00000002.safetensors").stat().st_mtime
        assert written - (tmp_path / name / "slow").stat().st_mtime > 14
    assert not (tmp_path / "preview" / "run" / "samples").exists()


def test_a_signal_given_twice_at_once_counts_once():
    """As `timeout` gives it: to the process, and to its group."""
    received = []
    with watch_signals(received.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]


# ---- resuming after a kill or damage ---------------------------------------------------------------------------------


def train_until(run, write):
    """Train in a copy of this process that is killed just before its n-th file is renamed to its place."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    left, replace = [write], os.replace

    def kill(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = kill
    try:
        list(train(run, load_trainer(run)))
    except BaseException:
        os._exit(1)
    os._exit(0)


def files(run):
    """Return the bytes of a run's files, without times and pictures of the metrics, which times are part of."""
    found = {str(p.relative_to(run.path)): p for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    kept = {name: p.read_bytes() for name, p in found.items() if name not in ("loss.png", "metrics.jsonl")}
    return kept | {"metrics.jsonl": without_times(found["metrics.jsonl"].read_text()), "loss.png": "loss.png" in found}


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_kill_at_every_write_of_a_step_is_made_up_for(tmp_path, monkeypatch, at_the_end):
    monkeypatch.setattr("unet_denoiser.training.loop.PREVIEW_STEPS", 1)
    run = make_run(tmp_path).with_training(steps=4, checkpoint_every=2, preview_every=2, keep_last=1)
    begun = Run(tmp_path / "begun", run.data, run.model, run.process, run.training)
    for step in train(begun, load_trainer(begun)):
        if step.step == (3 if at_the_end else 1):
            break
    assert train_until(run, 10**6)
    straight, write = files(run), 0
    while True:
        write += 1
        killed = replace(run, path=tmp_path / f"killed-{write}")
        shutil.copytree(begun.path, killed.path)
        finished = train_until(killed, write)
        latest = killed.load_model().state_dict()  # right in between, too
        tensors, _ = read_checkpoint(killed.checkpoints.paths()[-1])
        assert all(torch.equal(latest[name], t) for name, t in select_averages(tensors).items())
        assert train_until(killed, 10**6)
        assert files(killed) == straight
        if finished:
            break
    assert write > 7


@pytest.fixture
def trained(tmp_path):
    """A run of six steps with checkpoints at 2, 4 and 6."""
    run = make_run(tmp_path).with_training(steps=6, checkpoint_every=2, keep_last=3)
    list(train(run, load_trainer(run)))
    return run


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 100] ^= 1
    path.write_bytes(content)


def put_nan(path):
    tensors, metadata = read_checkpoint(path)
    tensors = dict(tensors) | {"ema.input_conv.bias": tensors["ema.input_conv.bias"] * float("nan")}
    write_safetensors(path, tensors, {"unet_denoiser_training": json.dumps(metadata)})


@pytest.mark.parametrize(
    "damage",
    [put_nan, flip_a_bit, lambda p: p.write_bytes(b""), lambda p: os.truncate(p, 9000)],
    ids=["NaN", "a bit", "empty", "cut off"],
)
def test_a_damaged_checkpoint_is_passed_over_and_kept(trained, damage):
    straight, path = files(trained), trained.checkpoints.find("6")
    damage(path)
    with pytest.warns(UserWarning, match=r"step-00000006.*; going on from step-00000004") as caught:
        trainer = load_trainer(trained)
    assert trainer.step == 4
    assert len(caught) == 1
    list(train(trained, trainer))
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.exists()
    aside.unlink()
    assert files(trained) == straight


def test_no_good_checkpoint_is_one_line(trained):
    for path in trained.checkpoints.paths():
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"has no checkpoint that can be used: .*step-00000006"):
        load_trainer(trained)
