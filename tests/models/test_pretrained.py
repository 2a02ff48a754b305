"""Saving and loading: exact, strict, atomic, from a directory or the hub, without holding the weights twice."""

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from support.networks import CONDITIONS, inputs, small
from unet_denoiser import UNet, UNetConfig
from unet_denoiser.utils.files import write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def saved(tmp_path):
    """A saved network: (the network, its directory)."""
    model, directory = small(**CONDITIONS, dropout=0.2), tmp_path / "a" / "model"
    assert model.save_pretrained(directory) is None
    return model, directory


# ---- round trip ----------------------------------------------------------------------------------------------------


def test_round_trip(saved):
    model, directory = saved
    args, random_state = inputs(model.config), torch.get_rng_state()
    loaded = UNet.from_pretrained(directory)
    assert torch.equal(torch.get_rng_state(), random_state)  # no weights are drawn only to be replaced
    assert loaded.config == model.config
    assert type(loaded) is UNet
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in loaded.state_dict().items())
    assert_close(loaded(**args), model(**args))
    assert not any(m.training for m in loaded.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, WEIGHTS]


def test_a_loaded_network_trains_and_is_saved_over_its_own_file(saved):
    _, directory = saved
    loaded = UNet.from_pretrained(str(directory)).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(**inputs(loaded.config)).square().mean().backward()
    optimizer.step()
    loaded.save_pretrained(directory)  # while its tensors may be mapped from the old one
    again = UNet.from_pretrained(directory)
    for name, p in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(dtype, tmp_path):
    small().to(dtype).save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path).dtype == dtype


def test_frozen_and_non_contiguous_weights_are_saved(tmp_path):
    model = small().requires_grad_(False).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    args = inputs(model.config)
    assert_close(UNet.from_pretrained(tmp_path)(**args), model(**args))


def test_the_files_are_plain(saved):
    model, directory = saved
    assert json.loads((directory / CONFIG).read_text()) == model.config.to_dict()
    stored = load_file(directory / WEIGHTS)
    assert {name: p.shape for name, p in stored.items()} == {name: p.shape for name, p in model.state_dict().items()}
    with safetensors.safe_open(directory / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # transformers and diffusers ask for it
    assert json.loads(metadata["unet_denoiser_config"]) == model.config.to_dict()
    assert metadata.keys() == {"format", "unet_denoiser_config", "unet_denoiser_digest"}


def test_options_can_be_changed_on_loading(saved):
    _, directory = saved
    loaded = UNet.from_pretrained(directory, dropout=0.0, norm_eps=0.1)
    assert (loaded.config.dropout, loaded.config.norm_eps) == (0.0, 0.1)
    assert {m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    with pytest.raises(ValueError, match=r"does not fit.*has class_embedding.weight \(5, 32\), not \(6, 32\)"):
        UNet.from_pretrained(directory, num_classes=6)
    with pytest.raises(ValueError, match="unknown U-Net option 'width'"):
        UNet.from_pretrained(directory, width=6)


def test_from_config():
    config = UNetConfig(model_channels=16, num_heads=2, num_classes=4, dropout=0.3)
    assert UNet.from_config(config).config == config


def test_another_config_can_be_saved(tmp_path):
    small().save_pretrained(tmp_path, config={"dropout": 0.25} | small().config.to_dict() | {"norm_eps": 0.5})
    assert UNet.from_pretrained(tmp_path).config.norm_eps == 0.5


@pytest.mark.parametrize("method", ["save_pretrained", "from_pretrained"])
def test_signatures_are_the_hub_mixin_s(method):
    def listed(cls):
        return [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, method)).parameters.values()]

    assert listed(UNet) == listed(huggingface_hub.ModelHubMixin)


# ---- strict --------------------------------------------------------------------------------------------------------


def change_weights(directory, change):
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("input_conv.bias"), r"it lacks input_conv.bias \(8,\)$"),
        (lambda state: state.update(extra=torch.zeros(3)), r"it has extra \(3,\), which the network lacks$"),
        (
            lambda state: state.update({"input_conv.bias": torch.zeros(9)}),
            r"it has input_conv.bias \(9,\), not \(8,\)$",
        ),
        (lambda state: [state.pop(name) for name in list(state)[:7]], r"(it lacks .*){3}; and 4 more differences$"),
    ],
)
def test_weights_must_fit_exactly(saved, change, message):
    _, directory = saved
    change_weights(directory, change)
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit its architecture: {message}"):
        UNet.from_pretrained(directory)


def truncated(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncated, ValueError, f"{WEIGHTS} is not a readable safetensors file"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), ValueError, f"{WEIGHTS} is not a readable safetensors file"),
        (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, f"has no {WEIGHTS}.*save_pretrained"),
        (lambda d: (d / CONFIG).unlink(), FileNotFoundError, f"has no {CONFIG}.*save_pretrained"),
        (lambda d: (d / CONFIG).write_text("{"), ValueError, f"{CONFIG} is not valid JSON"),
        (lambda d: (d / CONFIG).write_bytes(b"\xff"), ValueError, f"{CONFIG} is not valid JSON"),
        (lambda d: (d / CONFIG).write_text("[1]"), ValueError, f"{CONFIG} holds a JSON list, not an object"),
        (lambda d: (d / CONFIG).write_text('{"depth": 3}'), ValueError, "unknown U-Net option 'depth'"),
        (lambda d: (d / CONFIG).write_text('{"dims": 4}'), ValueError, "dims=4 is not one of 1, 2, 3"),
    ],
)
def test_damaged_files_are_named(saved, damage, error, message):
    _, directory = saved
    damage(directory)
    with pytest.raises(error, match=message):
        UNet.from_pretrained(directory)


@pytest.mark.parametrize("name", ["missing", "./a/b", "/no/such", "a/b/c", "a b/c"])
def test_neither_a_directory_nor_a_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"^{re.escape(name)} is neither a directory nor a hub repository's name"
    ):
        UNet.from_pretrained(name)


def test_a_file_of_weights_alone_has_its_architecture(saved, tmp_path):
    model, directory = saved
    (directory / WEIGHTS).rename(tmp_path / "alone.safetensors")
    loaded = UNet.from_pretrained(tmp_path / "alone.safetensors", dropout=0.0)
    assert loaded.config == replace(model.config, dropout=0.0)
    assert torch.equal(loaded.input_conv.weight, model.input_conv.weight)
    save_file(load_file(tmp_path / "alone.safetensors"), tmp_path / "old.safetensors")  # as without a header
    with pytest.raises(ValueError, match=r"own weights; give the directory that has their config\.json"):
        UNet.from_pretrained(tmp_path / "old.safetensors")


# ---- atomic --------------------------------------------------------------------------------------------------------


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_a_failing_save_leaves_a_loadable_network(saved, monkeypatch):
    model, directory = saved

    def fail(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        small(seed=1, **CONDITIONS).save_pretrained(directory)
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(UNet.from_pretrained(directory).input_conv.weight, model.input_conv.weight)


# ---- the hub -------------------------------------------------------------------------------------------------------


def test_offline_is_one_clear_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^owner/name is no directory here, and config.json cannot be had"
    ) as e:
        UNet.from_pretrained("owner/name", cache_dir=tmp_path)
    assert e.value.__cause__ is None
    assert e.value.__suppress_context__
    assert "\n" not in str(e.value)


def test_loads_from_the_hub(saved, monkeypatch):
    model, directory = saved
    calls = []

    def download(repo_id, filename, **options):
        calls.append((repo_id, filename, options))
        return str(directory / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = UNet.from_pretrained("owner/name", revision="v1", token="t", cache_dir="c", force_download=True, dropout=0)
    assert torch.equal(loaded.input_conv.weight, model.input_conv.weight)
    assert loaded.config.dropout == 0
    options = {"revision": "v1", "token": "t", "cache_dir": "c", "force_download": True, "local_files_only": False}
    options["subfolder"] = None
    assert calls == [("owner/name", CONFIG, options), ("owner/name", WEIGHTS, options)]


@pytest.mark.parametrize("repo_id", [None, "owner/name"])
def test_pushes_to_the_hub(tmp_path, monkeypatch, repo_id):
    uploaded = {}

    class Api:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, exist_ok):
            assert exist_ok
            return type("Url", (), {"repo_id": f"user/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "hub")
            uploaded.update(options, repo_id=repo_id)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = small()
    url = model.save_pretrained(tmp_path / "mine", repo_id=repo_id, push_to_hub=True, token="t", commit_message="m")
    assert url == "https://hub/commit"
    assert uploaded == {"token": "t", "commit_message": "m", "repo_id": f"user/{repo_id or 'mine'}"}
    assert torch.equal(UNet.from_pretrained(tmp_path / "hub").input_conv.weight, model.input_conv.weight)


def test_model_cards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_card_kwargs is not supported"):
        small().save_pretrained(tmp_path, model_card_kwargs={})
    assert list(tmp_path.iterdir()) == []


# ---- what belongs together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [("dropout", 0.0), ("norm_eps", 1e-3), ("time_frequencies", "half")])
def test_a_config_of_other_weights_is_refused_by_its_field(saved, field, value):
    """None of these fields changes a shape."""
    model, directory = saved
    (directory / CONFIG).write_text(json.dumps(model.config.to_dict() | {field: value}))
    with pytest.raises(ValueError, match=rf"{CONFIG} has {field}={value!r}, and the weights beside it were saved with"):
        UNet.from_pretrained(directory)
    assert UNet.from_pretrained(directory / WEIGHTS).config == model.config


def test_weights_without_a_header_load_as_before(saved):
    model, directory = saved
    change_weights(directory, lambda state: None)
    assert UNet.from_pretrained(directory).config == model.config


def test_a_changed_bit_is_noticed(saved):
    _, directory = saved
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged: its contents do not match its digest"):
        UNet.from_pretrained(directory)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = small()
    model.input_conv.bias.data[2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"input_conv\.bias has values that are not finite"):
        UNet.from_pretrained(tmp_path)


def test_a_network_whose_layers_do_not_fit_its_config_is_not_saved(tmp_path):
    model = small()
    model.input_conv = torch.nn.Conv2d(5, model.config.stem_width, 3, padding=1)
    with pytest.raises(ValueError, match=r"input_conv\.weight: the network has \(8, 5, 3, 3\), .* for \(8, 3, 3, 3\)"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model.save_pretrained(tmp_path / "m", config=replace(model.config, in_channels=5))
    assert torch.equal(UNet.from_pretrained(tmp_path / "m").input_conv.weight, model.input_conv.weight)


def test_weights_of_a_compiled_network_load(saved):
    model, directory = saved
    for prefix in ("_orig_mod.", "module."):
        state = {prefix + name: p for name, p in model.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        assert torch.equal(UNet.from_pretrained(directory).input_conv.weight, model.input_conv.weight)
    torch.save({"state_dict": state}, directory / "model.pt")
    assert torch.equal(UNet.from_pretrained(directory / "model.pt").input_conv.weight, model.input_conv.weight)


def test_shards_load(saved):
    model, directory = saved
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = {name: f"model-0000{i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(names.values()):
        save_file({name: state[name] for name in names if names[name] == shard}, directory / shard)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    assert torch.equal(UNet.from_pretrained(directory).input_conv.weight, model.input_conv.weight)
    (directory / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard}, which is not there: the download is incomplete"):
        UNet.from_pretrained(directory)


# ---- options -------------------------------------------------------------------------------------------------------


def test_a_dtype_can_be_asked_for(saved):
    _, directory = saved
    for source in (directory, directory / WEIGHTS):
        loaded = UNet.from_pretrained(source, torch_dtype=torch.float16)
        assert {p.dtype for p in loaded.parameters()} == {torch.float16}


def test_a_network_of_several_dtypes_is_loaded_in_the_widest(tmp_path):
    model = small().half()
    model.time_mlp.float()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"all are loaded as torch\.float32"):
        loaded = UNet.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded(**inputs(loaded.config))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("dtype", "unknown U-Net option 'dtype'; did you mean torch_dtype?"),
        ("num_head", "unknown U-Net option 'num_head'; did you mean num_heads"),
        ("device_map", "unknown U-Net option 'device_map'; the options are"),
        ("ema", "is this library's own, which tells all; leave out ema"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(option, message, saved):
    with pytest.raises(ValueError, match=re.escape(message)):
        UNet.from_pretrained(saved[1], **{option: 1})


def test_the_root_of_a_pipeline_points_at_its_network(tmp_path):
    index = {"_class_name": "SomePipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "VAE"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"a pipeline of diffusers .*: give .*/unet, or subfolder='unet'"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "SomeTransformer"]}))
    with pytest.raises(FileNotFoundError, match="without a U-Net"):
        UNet.from_pretrained(tmp_path)
