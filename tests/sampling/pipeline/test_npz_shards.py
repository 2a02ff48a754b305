"""Many samples on disk: files appear whole, sampling is resumed, in one process or two; settings are not mixed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser import Run, sample
from unet_denoiser.cli.app import main
from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.load import load_data
from unet_denoiser.sampling.pipeline.npz_shards import Shards, digest_weights, read_shards
from unet_denoiser.utils.images import to_uint8

TINY = "--model.model-channels 8 --model.num-res-blocks 1 --batch-size 4 --steps 1 --device cpu".split()  # noqa: SIM905
OPTIONS = ["--num-inference-steps", "2", "--batch-size", "2", "--num-images", "40", "--device", "cpu", "--seed", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "run"
    main(["train", "digits", "--out", str(path), *TINY])
    return path


@pytest.fixture(scope="module")
def undisturbed(run):
    folder = run.parent / "undisturbed"
    main(["sample", str(run), "--out", str(folder), *OPTIONS])
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_files_hold_the_samples(run, undisturbed):
    names = ["000000-000015.npz", "000016-000031.npz", "000032-000039.npz", "settings.json"]
    assert [file.name for file in sorted(undisturbed.iterdir())] == names
    loaded, labels = Run.load(run), torch.arange(40) % 10
    x = sample(loaded.load_model(), loaded.process, seeds=range(7, 47), class_labels=labels, num_inference_steps=2)
    expected, found = to_uint8(x)[:, 0].numpy().astype(int), read_shards(undisturbed).astype(int)
    assert found.shape == (40, 8, 8)
    assert np.abs(found - expected).max() <= 1  # a value on the edge may be rounded otherwise
    assert (found != expected).mean() < 0.01
    assert read_shards(undisturbed, "labels").tolist() == labels.tolist()
    assert read_shards(undisturbed, "seeds").tolist() == list(range(7, 47))


def test_a_file_is_a_dataset(undisturbed):
    data = load_data(DataConfig(str(undisturbed / "000000-000015.npz")))
    assert len(data) == 16
    assert data[3]["class_labels"] == 3


def test_classes_take_turns_across_files(run, tmp_path):
    main(["sample", str(run), "--out", str(tmp_path / "some"), *OPTIONS, "--class", "3", "1", "8"])
    assert read_shards(tmp_path / "some", "labels").tolist() == [(3, 1, 8)[i % 3] for i in range(40)]


def start(args):
    """Run the command in a copy of this process, which has everything imported already; return its process id.

    It waits after each file, so that a signal finds it unfinished however late it comes.
    """
    child = os.fork()
    if child:
        return child
    code, write = 1, Shards.write
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
    try:
        Shards.write = lambda *args: (write(*args), time.sleep(2))
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resumes_after_an_interruption(run, undisturbed, tmp_path, number, capfd):
    folder = tmp_path / "interrupted"
    command = ["sample", run, "--out", folder, *OPTIONS]
    child = start(command)
    while not list(folder.glob("*.npz")):
        time.sleep(0.001)
    os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    if number == signal.SIGINT:
        assert os.waitstatus_to_exitcode(status) == 130
        lines = [line for line in capfd.readouterr().err.splitlines() if "unet-denoiser" in line]
        assert lines[0].endswith(" of 40 samples; the same command goes on")
    assert 1 <= len(before) < 3
    (folder / ".000016-000031.npz.1.tmp").write_bytes(b"half")  # as a kill while writing leaves it
    main([str(arg) for arg in command])
    assert contents(folder) == contents(undisturbed)
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--guidance-scale", "2"], "holds samples made with guidance_scale=1.0, not 2.0; give another folder"),
        (["--num-images", "39"], "holds samples made with num_images=40, not 39"),
        (["--seed", "8"], "holds samples made with seed=7, not 8"),
        (["--class", "3"], "holds samples made with class=[], not"),
        (["--reuse", "3"], "holds samples made with reuse=null, not 3"),
    ],
)
def test_refuses_to_mix_settings(run, undisturbed, capsys, changed, message):
    before = contents(undisturbed)
    with pytest.raises(SystemExit) as end:
        main(["sample", str(run), "--out", str(undisturbed), *OPTIONS, *changed])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert contents(undisturbed) == before


def test_a_folder_grows(run, undisturbed, tmp_path):
    folder = tmp_path / "grown"
    main(["sample", str(run), "--out", str(folder), *OPTIONS, "--num-images", "20"])
    kept = (folder / "000000-000015.npz").stat().st_mtime_ns
    (folder / "statistics.npz").write_bytes(b"mine")
    loaded = json.loads((folder / "settings.json").read_text())
    size, count = loaded.pop("shard_size"), loaded.pop("num_images")
    Shards(folder, count + 20, size, loaded).clean()
    assert (folder / "000016-000019.npz").exists()  # until what replaces it is there
    main(["sample", str(run), "--out", str(folder), *OPTIONS])
    assert (folder / "statistics.npz").read_bytes() == b"mine"
    (folder / "statistics.npz").unlink()
    assert contents(folder) == contents(undisturbed)
    assert (folder / "000000-000015.npz").stat().st_mtime_ns == kept


def test_other_weights_are_other_settings(run, undisturbed):
    model = Run.load(run).load_model()
    weights = digest_weights(model)
    assert json.loads((undisturbed / "settings.json").read_text())["weights"] == weights
    with torch.no_grad():
        model.output[-1].bias += 1e-6
    assert digest_weights(model) != weights


def test_two_processes_write_the_same_as_one(run, undisturbed, tmp_path):
    worker = Path(__file__).parents[2] / "support" / "sampling_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    command += [run, tmp_path / "two", tmp_path / "two.png", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{tmp_path / 'two'}: 40 samples in 3 files", str(tmp_path / "two.png")]
    assert contents(tmp_path / "two") == contents(undisturbed)
    main(["sample", str(run), "--out", str(tmp_path / "one.png"), *OPTIONS, "--num-images", "5"])
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1


def test_warns_if_accelerate_starts_one_process_on_a_cpu(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.warns(UserWarning, match="accelerate launch starts one process on CPUs"):
        main(["sample", str(run), "--out", str(tmp_path / "a.png"), *OPTIONS, "--num-images", "1"])


@pytest.mark.parametrize(
    ("wrong", "message"), [(["--class", "cat"], "class='cat'"), (["--batch-size", "0"], "batch_size=0 must be")]
)
def test_a_refused_request_leaves_the_folder_usable(run, undisturbed, tmp_path, capsys, wrong, message):
    folder = tmp_path / "new"
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--out", str(folder), *OPTIONS, *wrong])
    assert message in capsys.readouterr().err
    main(["sample", str(run), "--out", str(folder), *OPTIONS])
    assert contents(folder) == contents(undisturbed)


def test_refuses_folders_of_other_things(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds something else than samples; give a new folder"):
        Shards(tmp_path, 10, 4, {})
    with pytest.raises(ValueError, match="holds something else than samples"):
        Shards(tmp_path / "holiday.png", 10, 4, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text('{"volume": 11}')
    with pytest.raises(ValueError, match="holds samples made with num_images"):
        Shards(tmp_path / "mine", 10, 4, {})
    with pytest.raises(ValueError, match="is not of samples: it lacks num_images or shard_size"):
        read_shards(tmp_path / "mine")
    assert (tmp_path / "mine" / "settings.json").read_text() == '{"volume": 11}'


def test_a_folder_keeps_the_size_of_its_files(tmp_path):
    shards = Shards(tmp_path / "s", 10, 4, {"seed": 0})
    assert shards.missing == [range(0, 4), range(4, 8), range(8, 10)]
    shards.write(range(4, 8), {"images": np.arange(4)})
    with pytest.raises(ValueError, match=r"000008-000009\.npz is for 2 samples"):
        shards.write(range(8, 10), {"images": np.arange(3)})
    again = Shards(tmp_path / "s", 10, 99, {"seed": 0})
    assert again.missing == [range(0, 4), range(8, 10)]
    with pytest.raises(ValueError, match="lacks 2 of its files"):
        read_shards(tmp_path / "s")
