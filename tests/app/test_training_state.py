"""The state of a training, from its run directory alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import TINY
from unet_denoiser.app.training_process import resume_training, start_training, stop_training
from unet_denoiser.app.training_state import read_log, read_training
from unet_denoiser.cli.app import main
from unet_denoiser.utils.processes import announce, find_worker

OLD = Path(__file__).parents[1] / "support" / "old"
LEVELS = [0.1] * 8


def write_metrics(run, steps):
    lines = [
        {"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "loss_per_level": LEVELS}
        for step in steps
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"training": {"steps": 200}}))
    return tmp_path


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def test_a_training_of_the_command_is_finished_and_leaves_no_process_behind(tmp_path):
    main(["train", "digits", "--out", str(tmp_path / "run"), *TINY])
    state = read_training(tmp_path / "run")
    assert (state.status, state.step, state.steps, state.seconds_left) == ("finished", 3, 3, None)
    assert [file.name for file in state.previews] == ["step-00000003.png"]
    assert [line["step"] for line in state.metrics] == [3]
    assert not (tmp_path / "run" / ".process.json").exists()


def test_the_time_left_is_that_of_the_remaining_steps_at_the_mean_speed(run, sleeper):
    """60 steps since step 40 in 30 s, so 100 more take 50 s."""
    announce(run / ".process.json", sleeper.pid, step=40)
    since = time.time() + 1
    os.utime(run / ".process.json", (since, since))
    write_metrics(run, range(10, 101, 10))
    os.utime(run / "metrics.jsonl", (since + 30, since + 30))
    state = read_training(run)
    assert (state.status, state.step, state.steps, state.runs) == ("training", 100, 200, True)
    assert state.seconds_left == pytest.approx(50.0)


def test_before_its_first_step_a_training_is_starting(run, sleeper):
    announce(run / ".process.json", sleeper.pid)
    (run / "train.log").write_text("reading photos ...\nphotos: 12 images")
    state = read_training(run)
    assert (state.status, state.step, state.seconds_left, state.message) == ("starting", 0, None, "photos: 12 images")


def test_a_killed_training_is_stopped_where_its_files_end(run, sleeper):
    announce(run / ".process.json", sleeper.pid, step=0)
    write_metrics(run, [10, 20])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000026.safetensors").touch()
    assert read_training(run).status == "training"
    sleeper.kill()
    sleeper.wait()
    state = read_training(run)
    assert (state.status, state.step, state.runs) == ("stopped", 26, False)


def test_a_process_that_inherited_the_number_is_not_the_training(run, sleeper):
    announce(run / ".process.json", sleeper.pid, step=0)
    os.utime(run / ".process.json", (1e9, 1e9))  # long before that process began
    assert find_worker(run / ".process.json") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x"}', '{"pid": -1}', '{"pid": 4194304999}', "\xff"])
def test_a_damaged_file_names_no_process(tmp_path, text):
    (tmp_path / "file").write_text(text, encoding="latin-1")
    assert find_worker(tmp_path / "file") is None
    assert find_worker(tmp_path / "missing") is None


def test_a_training_that_never_began_has_failed_with_its_last_line(run):
    (run / "train.log").write_bytes(b"reading photos ...\nunet-denoiser: error: photos has no image\n")
    state = read_training(run)
    assert (state.status, state.message) == ("failed", "unet-denoiser: error: photos has no image")


def test_a_progress_bar_is_read_as_a_terminal_shows_it(tmp_path):
    (tmp_path / "log").write_bytes(b"start\r\n 1/9\r 2/9\r 3/9\nend\n\xff")
    assert read_log(tmp_path / "log") == "start\n3/9\nend\n�"
    (tmp_path / "log").write_bytes(b"x" * 10_000 + b"\nlast")
    assert read_log(tmp_path / "log").endswith("x\nlast")
    assert len(read_log(tmp_path / "log")) <= 8192


def test_a_resumed_training_needs_more_steps(tmp_path):
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    with pytest.raises(ValueError, match=r"steps=2: .* is already at step 2; give a larger number"):
        resume_training(run, 2)


def test_what_cannot_be_done_is_one_line(tmp_path, run):
    with pytest.raises(ValueError, match="no training runs here"):
        stop_training(run)
    announce(run / ".process.json")
    with pytest.raises(ValueError, match="is training already"):
        resume_training(run)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        start_training("digits", tmp_path / "new", {"steps": 0})
    with pytest.raises(FileExistsError, match="already holds a run"):
        start_training("digits", run, {"steps": 1})
    assert not (tmp_path / "new").exists()


def test_a_training_that_is_started_fails_in_its_log_and_the_signal_to_stop_is_sigterm(tmp_path, sleeper):
    (tmp_path / "empty").mkdir()
    start_training(str(tmp_path / "empty"), tmp_path / "run", {"steps": 1, "learning_rate": None})
    assert read_training(tmp_path / "run").status == "starting"
    while read_training(tmp_path / "run").runs:
        time.sleep(0.1)
    state = read_training(tmp_path / "run")
    assert state.status == "failed"
    assert state.message.startswith("unet-denoiser: error: ")
    assert "empty" in state.message
    announce(tmp_path / "run" / ".process.json", sleeper.pid, step=0)
    stop_training(tmp_path / "run")
    assert sleeper.wait(timeout=20) == -signal.SIGTERM
