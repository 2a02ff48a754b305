"""The README's commands and examples, as printed; only the amount of training and sampling is cut."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from support.documents import ROOT, blocks, commands, table_commands
from support.networks import randomise
from unet_denoiser.cli.app import main

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "unet_denoiser"
SHORT = {
    "train": "--steps 2 --batch-size 2 --device cpu",
    "--resume": "--steps 3 --device cpu",
    "sample": "--num-inference-steps 2 --device cpu",
    "evaluate": "--num-samples 6 --num-inference-steps 2 --extractor pixels --allow-few --device cpu",
    "doctor": "--num-images 2 --num-samples 2 --device cpu",
    "info": "",
    "export": "",
}
CUT = re.compile(r"--(steps|batch-size|num-inference-steps|image-size) \d+")
MISSING_HERE = ("--text-encoder", "--vae", "--init", "convert")  # they need files of other projects


def run_shortened(arguments: list[str]) -> None:
    """Run a command with fewer steps."""
    short = SHORT["--resume" if "--resume" in arguments else arguments[0]]
    main([*CUT.sub("", " ".join(arguments)).split(), *short.split()])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with the files that the README's commands name, as the working directory."""
    folder = tmp_path_factory.mktemp("readme")
    places = [
        *(f"photos/{name}/{i}" for name in ("cats", "dogs") for i in range(8)),
        *(f"unseen/{i}" for i in range(8)),
    ]
    sizes = dict.fromkeys(places, (8, 8)) | {"mine": (8, 8), "mask": (8, 8), "small": (4, 4)}
    for i, (name, (height, width)) in enumerate(sizes.items()):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


def test_quick_start_on_the_command_line(photos, capsys):
    """All commands in their order."""
    listed = [line for block in blocks(README, "bash") for line in commands(block)]
    assert len(listed) == 7
    for arguments in listed:
        run_shortened(arguments)
    assert Path("runs/digits/samples.png").exists()
    assert Path("runs/photos/samples.png").exists()
    assert "35,746,307" in capsys.readouterr().out


def test_commands_of_the_table(photos):
    """On the run of the quick start; a task that trains has a run of its own."""
    listed = [arguments for arguments in table_commands(README) if not {*MISSING_HERE} & {*arguments}]
    assert len(listed) == 9
    for arguments in listed:
        run_shortened([*arguments, "--out", "runs/other"] if arguments[0] == "train" else arguments)


def test_quick_start_in_python(tmp_path, monkeypatch, capsys):
    code = blocks(README, "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 18
    monkeypatch.chdir(tmp_path)
    short = code.replace("steps=100, batch_size=32", "steps=3, batch_size=4")
    assert short != code
    exec(compile(short, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    with Image.open("digits.png") as image:
        assert image.size == (5 * 34 + 2, 4 * 34 + 2)


def tiny_stable_diffusion(folder: Path) -> None:
    """Save a Stable Diffusion pipeline with small random networks and a tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    Path("vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    Path("merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    ends = {"bos_token_id": 52, "eos_token_id": 53}
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=24, intermediate_size=32, **layers, **ends
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=randomise(unet),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        **off,
    ).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
def test_published_checkpoint_in_a_diffusers_pipeline(tmp_path, monkeypatch):
    """The image is the one that the pipeline makes with its own network."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny_stable_diffusion(Path("stable-diffusion-v1-5"))
    code = blocks(README, "python")[1]
    ours = [line for line in code.splitlines() if "DiffusersUNet(" in line]
    assert len(code.splitlines()) <= 5
    assert len(ours) == 1
    images = []
    for lines in (code, code.replace(ours[0], "")):
        torch.manual_seed(1)
        exec(compile(lines, "README.md", "exec"), {})
        with Image.open("dragon.png") as image:
            images.append(np.asarray(image).astype(int))
    assert images[0].std() > 5
    assert abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("command", ["make demo", "make test", "make docs"])
def test_make_commands_exist(command):
    """CI runs them itself (.ci/run)."""
    assert command in TEXT
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text()


def test_is_short():
    assert len(TEXT.splitlines()) <= 170


def test_names_every_package_in_the_order_of_imports():
    """Each package of the table imports only from those below it, as the linter's layers say."""
    named = re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.MULTILINE)
    layers = re.search(r"^layers = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert named == re.findall(r"\w+", layers)
    assert set(named) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_lines_of_the_tour():
    """True to within 10 %."""
    tour = re.findall(r"^\| \[`[\w/.]+`\]\(([\w/.]+)\) \| (\d+) \|", TEXT, flags=re.MULTILINE)
    counts = {path: (int(said), len((ROOT / path).read_text().splitlines())) for path, said in tour}
    assert len(counts) == 6
    assert not {path: pair for path, pair in counts.items() if abs(pair[0] - pair[1]) > 0.1 * pair[1]}
