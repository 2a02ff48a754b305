"""The pages of docs/: links, commands, conversions, and the names of the Python API."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import unet_denoiser
from support.documents import DOCUMENTS, ROOT, anchors, blocks, commands, table_commands
from support.networks import randomise
from unet_denoiser import UNet, preset
from unet_denoiser.cli.app import COMMANDS, main
from unet_denoiser.cli.options import parse_command
from unet_denoiser.convert.checkpoint import export_checkpoint, export_state_dict

CONVERT = ROOT / "docs" / "guide" / "convert.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", document.read_text(encoding="utf-8")):
        target = document.parent / link if link else document
        assert "//" in link or target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_no_wrong_option(document):
    """Each is parsed, not run."""
    for arguments in [line for block in blocks(document, "bash") for line in commands(block)]:
        parse_command(COMMANDS, "", arguments)
    for arguments in table_commands(document):
        if arguments[:1] and arguments[0] in COMMANDS and len(arguments) > 1 and arguments[1].islower():
            parse_command(COMMANDS, "", arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_compiles(document):
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")


def test_every_public_name_has_a_place_in_the_api():
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    named = re.findall(r"^::: unet_denoiser\.(?:\w+\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted({*unet_denoiser.__all__} - {"__version__"})


def test_python_of_sampling_and_editing(tmp_path, monkeypatch):
    """The blocks of the two pages, in one namespace each, on a small run with the classes of digits."""
    monkeypatch.chdir(tmp_path)
    model = "--model.model-channels 8 --model.norm-groups 4 --model.num-res-blocks 1"
    main([*f"train digits --out RUN --steps 2 --batch-size 2 --device cpu {model}".split()])
    Image.new("L", (8, 8), 90).save("image.png")
    Image.new("L", (4, 4), 90).save("small.png")
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    for page in ("sample", "edit"):
        code = "\n".join(blocks(ROOT / "docs" / "guide" / f"{page}.md", "python"))
        exec(code.replace("runs/photos", "RUN").replace('["cats"]', '["4"]'), {"mask": mask})
    for name in ("cats.png", "now.png", "strip.png", "samples.gif"):
        assert Path(name).stat().st_size > 100


@pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
def test_conversions(tmp_path, monkeypatch):
    """The first blocks of the page, on a small file in the layout of Stable Diffusion 1."""
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
    loads = re.findall(r'"(\S+(?:/unet|\.ckpt))"', blocks(CONVERT, "python")[0])
    assert len(loads) == 2
    for source in loads:  # a published file would need no help
        UNet.from_pretrained(source, **{"num_heads": 8} if source.endswith("ckpt") else {})
    lines = [arguments for arguments in commands(blocks(CONVERT, "bash")[0]) if arguments[1] != "runs/photos"]
    assert len(lines) == 5
    for i, arguments in enumerate(lines):
        again = i and arguments[2] == lines[0][2]  # the same file, verified
        arguments = [*arguments[:2], "verified", *arguments[3:]] if again else arguments
        main(arguments + (["--num-heads", "8"] if arguments[1].endswith("ckpt") else []))
    assert Path("verified/config.json").exists()
    assert Path("sd15/config.json").exists()
    assert Path("sd15-diffusers/config.json").exists()
    plain, styled = UNet.from_pretrained("sd15"), UNet.from_pretrained("sd15-style")
    assert [name for name, p in plain.named_parameters() if not torch.equal(p, styled.get_parameter(name))] == [
        "bottleneck.1.transformer_blocks.0.attn1.to_q.weight"
    ]
