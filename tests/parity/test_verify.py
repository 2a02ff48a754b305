"""`convert --verify` and `--lora`: the checkpoint's own code beside ours, before anything is written."""

import pytest
import safetensors.torch
import torch
from guided_diffusion.unet import UNetModel
from safetensors.torch import save_file

from support.adm import CASES, SMALL
from support.checkpoints import DIFFUSERS
from support.networks import randomise
from unet_denoiser import UNet
from unet_denoiser.cli.app import main
from unet_denoiser.convert.checkpoint import ForeignCheckpoint, export_checkpoint, export_state_dict
from unet_denoiser.convert.lora import merge_lora
from unet_denoiser.models.verify import compare


def verify(source, target, *options):
    main(["convert", str(source), str(target), "--verify", *options])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    kind, options = DIFFUSERS["sd-1"]
    randomise(kind(**options)).save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_folders_give_the_output_of_diffusers(name, tmp_path, capsys):
    kind, options = DIFFUSERS[name]
    randomise(kind(**options)).save_pretrained(tmp_path / "theirs")
    verify(tmp_path / "theirs", tmp_path / "ours")
    assert f"; {kind.__name__} gives the same output, to " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:norm_groups:UserWarning")
@pytest.mark.parametrize("name", ["iddpm-64-cond", "adm-64-cond", "adm-256", "adm-512-cond", "ldm-vq4"])
def test_adm_files_give_the_output_of_openais_code(name, tmp_path, capsys):
    options = SMALL | CASES[name]
    torch.save(randomise(UNetModel(**options)).state_dict(), tmp_path / "adm.pt")
    heads = ["--num-heads", "4"] if "num_heads" in options else ["--head-dim", str(options["num_head_channels"])]
    order = "new" if "use_new_attention_order" in options else "legacy"
    verify(tmp_path / "adm.pt", tmp_path / "ours", *heads, "--qkv-order", order)
    assert "; UNetModel gives the same output, to " in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_weights_are_read_once(options, tmp_path, monkeypatch):
    """With the comparison as without it; counted where the file is opened."""
    path = tmp_path / "adm.safetensors"
    save_file(randomise(UNetModel(**SMALL | CASES["adm-256"])).state_dict(), path)
    read, calls = safetensors.torch.load_file, []
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: calls.append(path) or read(path))
    main(["convert", str(path), str(tmp_path / "ours"), "--head-dim", "16", "--qkv-order", "legacy", *options])
    assert calls == [path]


@pytest.mark.parametrize(("dims", "image_size"), [(1, 16), (3, 8), (2, (16, 8))])
def test_signals_and_oblong_images_agree_and_volumes_do_not(dims, image_size, tmp_path):
    """In volumes OpenAI's code halves and doubles two of the three axes, ours all: the comparison must tell."""
    peer = randomise(UNetModel(**SMALL | CASES["iddpm-64-cond"] | {"dims": dims}))
    torch.save(peer.state_dict(), tmp_path / "adm.pt")
    checkpoint = ForeignCheckpoint.open(tmp_path / "adm.pt", image_size=image_size, num_heads=4, qkv_order="legacy")
    found = compare(checkpoint, UNet.from_checkpoint(checkpoint))
    assert found.peer == "UNetModel"
    assert (found.error > 0.1) if dims == 3 else (found.error < 1e-5)


@pytest.mark.parametrize("name", ["sd-1", "sdxl"])
def test_ldm_files_give_the_output_of_diffusers(name, tmp_path, capsys):
    kind, options = DIFFUSERS[name]
    randomise(kind(**options)).save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    export_checkpoint(model.state_dict(), model.config, tmp_path / "ldm.safetensors", "ldm")
    verify(
        tmp_path / "ldm.safetensors",
        tmp_path / "ours",
        *(["--num-heads", "8"] if name == "sd-1" else ["--head-dim", "32"]),
    )
    assert "; UNet2DConditionModel gives the same output, to " in capsys.readouterr().out


def test_other_numbers_are_an_error_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    build = UNet.from_checkpoint

    def wrong(checkpoint):
        model = build(checkpoint)
        bias = model.get_parameter("decoder.3.0.conv1.bias")
        bias.data = bias + 0.5 * (torch.arange(len(bias)) == 5)  # not in place: the checkpoint shares the memory
        return model

    monkeypatch.setattr(UNet, "from_checkpoint", wrong)
    with pytest.raises(SystemExit, match="2"):
        verify(folder, tmp_path / "ours")
    assert "UNet2DConditionModel gives other numbers" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def ddpm_file(folder, tmp_path):
    kind, options = DIFFUSERS["ddpm"]
    randomise(kind(**options)).save_pretrained(tmp_path / "ddpm")
    model = UNet.from_pretrained(tmp_path / "ddpm")
    save_file(export_state_dict(model.state_dict(), model.config, "ddpm"), tmp_path / "ddpm.safetensors")
    return tmp_path / "ddpm.safetensors"


def our_own(folder, tmp_path):
    UNet.from_pretrained(folder).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def untrained(folder, tmp_path):
    kind, options = DIFFUSERS["sd-1"]
    peer = randomise(kind(**options))
    torch.nn.init.zeros_(peer.conv_out.weight)
    torch.nn.init.zeros_(peer.conv_out.bias)
    peer.save_pretrained(tmp_path / "zero")
    return tmp_path / "zero"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ddpm_file, "no installed package runs files of the ddpm layout"),
        (our_own, "this library's own; there is no other code"),
        (untrained, "an untrained network, whose output is zero"),
    ],
)
def test_a_checkpoint_that_cannot_be_verified_is_refused(make, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        verify(make(folder, tmp_path), tmp_path / "out", *(["--num-heads", "1"] if make is ddpm_file else []))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_merges_a_lora(folder, tmp_path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = 32
    save_file(
        {f"{name}.lora_A.weight": torch.randn(4, width), f"{name}.lora_B.weight": torch.randn(width, 4)},
        tmp_path / "lora.safetensors",
    )
    main(
        [
            "convert",
            str(folder),
            str(tmp_path / "out"),
            "--lora",
            str(tmp_path / "lora.safetensors"),
            "--lora-scale",
            "0.5",
        ]
    )
    expected = UNet.from_pretrained(folder)
    assert merge_lora(expected, tmp_path / "lora.safetensors", 0.5) == 1
    merged = UNet.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in expected.state_dict().items())
