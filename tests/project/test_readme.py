"""The README's commands and example, as printed; only the amount of training is cut."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.networks import randomise
from unet_denoiser import UNet, preset
from unet_denoiser.cli.app import main
from unet_denoiser.convert.checkpoint import export_checkpoint, export_state_dict

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train": "--steps 2 --batch-size 2 --image-size 8 --device cpu",
    "--resume": "--steps 3 --device cpu",
    "sample": "--num-inference-steps 2 --device cpu",
    "doctor": "--num-images 2 --num-samples 2 --device cpu",
    "info": "",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_checkpoint_examples(tmp_path, monkeypatch):
    """The second Python block and the conversions, on a small file in the layout of Stable Diffusion 1."""
    monkeypatch.chdir(tmp_path)
    config = replace(preset("sd-1.5"), model_channels=32, context_dim=8)
    state = randomise(UNet.from_config(config)).state_dict()
    export_checkpoint(state, config, Path("stable-diffusion-v1-5/unet"), "diffusers")
    theirs = {f"model.diffusion_model.{name}": p for name, p in export_state_dict(state, config, "compvis").items()}
    torch.save({"state_dict": theirs}, "v1-5-pruned.ckpt")
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_{k}.weight": torch.ones(s) for k, s in (("down", (2, 128)), ("up", (128, 2)))},
        "style.safetensors",
    )
    for line in blocks("python")[1].splitlines():
        heads = "" if "unet" in line else ", num_heads=8"  # a published file would need no help
        exec(line.split("#")[0].rstrip()[:-1] + heads + ")", {"UNet": UNet})
    everything = "\n".join(blocks("bash"))
    lines = [line for line in everything.splitlines() if line.startswith("unet-denoiser convert")]
    assert len(lines) == 4
    for line in lines:
        args = shlex.split(line, comments=True)[1:]
        main(args + (["--num-heads", "8"] if args[1].endswith("ckpt") else []))
    assert Path("sd15/config.json").exists()
    assert Path("sd15-diffusers/config.json").exists()
    plain, styled = UNet.from_pretrained("sd15"), UNet.from_pretrained("sd15-style")
    assert [name for name, p in plain.named_parameters() if not torch.equal(p, styled.get_parameter(name))] == [
        "bottleneck.1.transformer_blocks.0.attn1.to_q.weight"
    ]


def test_python_example(tmp_path, monkeypatch, capsys):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    monkeypatch.chdir(tmp_path)
    short = code.replace("steps=100, batch_size=32", "steps=3, batch_size=4")
    assert short != code
    exec(compile(short, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    with Image.open("digits.png") as image:
        assert image.size == (5 * 34 + 2, 4 * 34 + 2)


def test_commands(tmp_path, monkeypatch, capsys):
    """All commands in their order, on a folder with the classes they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (10, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    lines = [line for line in blocks("bash")[1].splitlines() if line.startswith("unet-denoiser ")]
    assert len(lines) == 7
    for line in lines:
        _, command, *args = shlex.split(line, comments=True)
        short = SHORT["--resume" if "--resume" in args else command]
        main([command, *re.sub(r"--steps \d+", "", " ".join(args)).split(), *short.split()])
    assert Path("runs/pictures/samples.png").exists()
    assert "35,746,307" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_make_commands_exist(command):
    """CI runs these two themselves (.ci/run)."""
    assert command in README
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_file_trees_are_complete():
    """README and docs/development/architecture.md name every module."""
    modules = {p.name for p in (ROOT / "src" / "unet_denoiser").glob("*.py")} - {"__init__.py", "__main__.py"}
    for text in (README, (ROOT / "docs" / "development" / "architecture.md").read_text()):
        assert set(re.findall(r"(?:^  |; )(\w+\.py)[ :]", text, flags=re.MULTILINE)) - {"speed.py"} >= modules


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
