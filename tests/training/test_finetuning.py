"""Training from a checkpoint: the weights that load and the report; LoRA against peft and diffusers' names."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from support.networks import SMALL, inputs, randomise, relative_error, small
from support.trainings import Vectors, make_trainer, two_classes, weights
from unet_denoiser import DataConfig, Diffusion, Run, UNet, UNetConfig, merge_lora
from unet_denoiser.cli.app import main
from unet_denoiser.convert.checkpoint import export_state_dict
from unet_denoiser.convert.checkpoint_files import read_process
from unet_denoiser.training.finetuning import guess_process, load_matching, with_image_size
from unet_denoiser.training.loop import train

TINY = ["--batch-size", "4", "--device", "cpu", "--num-workers", "0"]
NETWORK = ["--model.model-channels", "8", "--model.num-res-blocks", "1"]


def test_other_classes_and_more_channels():
    start = small(num_classes=10)
    model = UNet(**SMALL | {"num_classes": 5, "in_channels": 5, "dropout": 0.0}).eval()
    rows = model.class_embedding.weight.detach().clone()
    report = str(load_matching(model, start))
    count = len(model.state_dict())
    assert report == (
        f"loaded {count - 1} of {count} tensors; widened with zeros: input_conv.weight (8x3x3x3 there, 8x5x3x3 here); "
        "not loaded: class_embedding.weight (10x32 there, 5x32 here)"
    )
    assert torch.equal(model.class_embedding.weight, rows)
    given = inputs(start.config)
    del given["class_labels"]  # the null class was loaded
    expected = start(**given)
    given["x"] = torch.cat([given["x"], torch.randn(2, 2, *given["x"].shape[2:])], 1)
    assert_close(model(**given), expected)  # the new channels have no effect at first


def test_additional_outputs_begin_with_zeros():
    start = small()
    model = UNet(**SMALL | {"out_channels": 6, "dropout": 0.0}).eval()
    assert "output.2.weight (3x8x3x3 there, 6x8x3x3 here)" in str(load_matching(model, start))
    out = model(**inputs(start.config))
    assert_close(out[:, :3], start(**inputs(start.config)))
    assert not out[:, 3:].any()


def test_attention_stays_at_its_levels_at_another_size():
    config = small(image_size=8, attention_resolutions=(4,)).config
    moved = with_image_size(config, (32, 24))
    assert (moved.image_size, moved.attention_resolutions) == ((32, 24), (16,))
    assert UNet.from_config(moved).state_dict().keys() == UNet.from_config(config).state_dict().keys()


def test_a_run_starts_from_another(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "digits", "--out", "a", *TINY, *NETWORK, "--steps", "3", "--process.beta-end", "0.03"])
    main(["train", "digits", "--out", "b", *TINY, "--steps", "1", "--init", "a", "--learning-rate", "1e-9"])
    a, b = Run.load("a"), Run.load("b")
    assert a.model == b.model
    assert a.process.to_dict() == b.process.to_dict()
    count = len(a.load_model().state_dict())
    assert f"a: loaded {count} of {count} tensors\n" in capsys.readouterr().out
    assert_close(b.load_model().state_dict(), a.load_model().state_dict(), atol=1e-6, rtol=0)
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", "c", *TINY, "--init", "a", "--preset", "ddpm-cifar10"])
    assert "give one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", "c", *TINY, "--lora-rank", "2"])
    assert "lora_rank=2 needs --init CHECKPOINT" in capsys.readouterr().err


def test_lora_trains_alone_resumes_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, "in_channels": 1, "out_channels": 1, "num_classes": 10}
    randomise(UNet(**options)).save_pretrained("base")
    args = ["digits", *TINY, "--init", "base", "--lora-rank", "2", "--learning-rate", "1e-2", "--checkpoint-every", "2"]
    main(["train", *args, "--out", "run", "--steps", "4"])
    run = Run.load("run")
    base, merged = UNet.from_pretrained("base"), run.load_model()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    assert changed
    assert all(name.rsplit(".", 2)[1] in ("to_q", "to_k", "to_v", "to_out") for name in changed)
    assert merge_lora(base, "run/lora.safetensors") == len(changed)
    assert_close(base.state_dict(), merged.state_dict())
    assert all(name.startswith("unet.") for name in json.loads(_header("run/lora.safetensors")) if "lora" in name)
    assert_close(run.load_model("4").state_dict(), merged.state_dict())
    (run.path / "checkpoints" / "step-00000004.safetensors").unlink()
    main(["train", "--resume", "run"])
    assert all(torch.equal(a, b) for a, b in zip(run.load_model().parameters(), merged.parameters(), strict=True))


def test_a_lora_is_refused_if_it_leaves_new_weights_untrained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    randomise(UNet(**SMALL, in_channels=1, out_channels=1, num_classes=3)).save_pretrained("base")
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits", *TINY, "--init", "base", "--lora-rank", "2", "--out", "run"])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "lora_rank=2: a LoRA would leave class_embedding.weight (3x" in message
    assert not (tmp_path / "run").exists()


def _header(path):
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_lora_of_a_network_unknown_to_diffusers(tmp_path):
    """Self- and cross-attention side by side: under our own names."""
    net = {"context_dim": 5, "attention_resolutions": (4,)}
    data = two_classes()
    trainer = make_trainer(
        {"lora_rank": 2, "steps": 2, "learning_rate": 0.1},
        net=net,
        data=Vectors(data.images.numpy(), data.labels.numpy()),
    )
    randomise(trainer.model)
    base = {n.replace(".base_layer.", "."): t for n, t in weights(trainer.model).items() if "lora_" not in n}
    run = Run(tmp_path, DataConfig("two"), trainer.model.config, Diffusion(), trainer.config)
    list(train(run, trainer))
    again = UNet.from_config(trainer.model.config)
    again.load_state_dict(base)
    assert merge_lora(again, tmp_path / "lora.safetensors") > 0
    merged = run.load_model().state_dict()
    assert max(relative_error(again.state_dict()[name], merged[name]) for name in merged if merged[name].any()) < 1e-5


LATENT = {"in_channels": 4, "out_channels": 4, "attention": "transformer", "context_dim": 6, "norm_groups": 4}
LATENT |= {"model_channels": 32, "learned_null": False, "upsample": "nearest", "time_frequencies": "half"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize(
    ("marks", "metadata", "told", "words"),
    [
        ((), {}, {"prediction_type": "epsilon"}, "taken to predict epsilon, along the scaled_linear schedule unless"),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}, "the file tells v_prediction, along the scaled_linear"),
        (
            ("v_pred", "ztsnr"),
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            "with zero terminal SNR",
        ),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}, "the file tells v_prediction"),
        ((), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}, "the file tells epsilon"),
    ],
)
@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_file_of_stable_diffusion_tells_its_process(marks, metadata, told, words, in_channels, tmp_path):
    model = UNet(**SMALL | LATENT | {"in_channels": in_channels})
    state = export_state_dict(model.state_dict(), model.config, "compvis")
    state = {f"model.diffusion_model.{name}": p.contiguous() for name, p in state.items()}
    save_file(state | {mark: torch.zeros(0) for mark in marks}, tmp_path / "m.safetensors", metadata)
    network = UNet.from_pretrained(tmp_path / "m.safetensors", num_heads=2)
    config, message = guess_process(network.config, read_process(tmp_path / "m.safetensors"))
    assert config.items() >= (SCALED | told).items()
    assert words in message + " unless"


def test_other_networks_are_taken_to_be_of_ddpm():
    config, message = guess_process(small().config, {})
    assert (config["beta_schedule"], config["prediction_type"], config["clip_sample"]) == ("linear", "epsilon", True)
    assert message == "taken to predict epsilon, along the linear schedule"
    config, message = guess_process(UNetConfig(**SMALL | LATENT | {"context_dim": 1024}), {})
    assert "for 768 pixels predicts v: --process.prediction-type v_prediction" in message
