"""The command line: parsing, help, exit codes and the table of info."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import TINY, error
from support.family import FAMILY
from unet_denoiser import UNet, UNetConfig
from unet_denoiser.__main__ import main as entry
from unet_denoiser.cli.app import main
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.convert.checkpoint import export_checkpoint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", r"Expected one of \{train, distill, sample, evaluate, doctor, info, convert, export, share, app\}"),
        ("paint", "Unrecognized options: paint"),
        ("sample", r"Missing from unet-denoiser sample: RUN .*\(see unet-denoiser sample --help\)"),
        ("train digits --bach-size 3", "Unrecognized options: --bach-size, 3; --batch-size is near"),
        ("train digits --steps x", "--steps: invalid literal for int.*'x'"),
        ("train digits --image-size", r"image_size=\(\) must be"),
        ("sample run --sampler foo", "invalid choice 'foo' for argument '--sampler'. Expected one of .*'unipc'"),
        ("convert a b --to onnx", "invalid choice 'onnx' for argument '--to'. Expected one of .*'ldm'"),
    ],
)
@pytest.mark.usefixtures("here")  # where no run has the default's name yet
def test_wrong_command_lines_are_one_line(capsys, args, message):
    assert re.search(message, error(capsys, *args.split()))


def test_a_process_exits_with_2():
    args, utf8 = [sys.executable, "-m", "unet_denoiser", "paint"], os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(args, capture_output=True, text=True, check=False, env=utf8)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "unet-denoiser: error: Unrecognized options: paint (see unet-denoiser --help)\n"


def test_help_has_every_option_and_its_description(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for config, prefix in ((UNetConfig, "model."), (TrainingConfig, ""), (DataConfig, "")):
        for name in config.__dataclass_fields__:
            if name not in ("_", "source", "conventions"):
                assert f"--{prefix}{name.replace('_', '-')}" in text
    assert "GroupNorm" in text


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, unet_denoiser.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_an_interrupt_during_the_imports_is_no_traceback(monkeypatch):
    class Loading:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "unet_denoiser.cli", Loading())
    with pytest.raises(SystemExit) as exit_info:
        entry()
    assert exit_info.value.code == 130


def test_info_shows_presets_runs_and_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "digits", "--out", "run", *TINY])
    capsys.readouterr()
    main(["info", "ddpm-cifar10", "--diagram", "net.svg"])
    table = capsys.readouterr().out
    assert Path("net.svg").read_text().startswith("<svg")
    assert "give a name that ends in .svg" in error(capsys, "info", "ddpm-cifar10", "--diagram", "net.txt")
    assert "35,746,307" in table
    assert [line.split()[:4] for line in table.splitlines() if line.startswith("encoder 1")] == [
        ["encoder", "1", "16x16", "256"]
    ]
    for place in ("run", "run/model"):
        main(["info", str(place)])
        assert "model_channels=8" in capsys.readouterr().out
    export_checkpoint(UNet(**FAMILY).state_dict(), UNetConfig(**FAMILY), Path("theirs"), "diffusers")
    for place in ("theirs", "theirs/diffusion_pytorch_model.safetensors", "run/model/model.safetensors"):
        main(["info", str(place)])
        assert "model_channels=8" in capsys.readouterr().out
    assert "neither a run, a model's directory or file nor a preset: specification" in error(capsys, "info", "sd-9")
