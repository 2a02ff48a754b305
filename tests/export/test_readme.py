"""The README's code, run as it is: its samples beside those of `sample` from the same noise."""

import numpy as np
import pytest
import torch

from support.exports import first_noise, pipeline, readme_blocks, run_readme, run_sampling, without_engine
from unet_denoiser import Diffusion, Start, sample
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.config.export import ExportConfig
from unet_denoiser.diffusion.process import StepRules
from unet_denoiser.sampling.pipeline.exporting import export_pipeline

PUBLISHED = Diffusion(beta_schedule="linear")
PUBLISHED.step_rules = StepRules(steps_offset=1, ends_noisy=True, keeps_noise=True)
RANGE = Diffusion().distilled(DistillationConfig(num_steps=2, guidance_scale=(1.0, 3.0), teacher_steps=4))

CASES = {
    "classes": (Diffusion(), {"num_classes": 5}),
    "flow": (Diffusion(path="flow"), {"num_classes": 5}),
    "edm": (Diffusion(path="edm"), {"num_classes": 5}),
    "no conditions, v": (Diffusion(prediction_type="v_prediction"), {}),
    "numbers and tokens": (Diffusion(), {"vector_dim": 3, "context_dim": 6}),
    "no learned null": (PUBLISHED, {"context_dim": 6, "learned_null": False}),
    "learned variance": (Diffusion(variance_type="learned_range"), {"out_channels": 2, "num_classes": 5}),
    "self-conditioning": (Diffusion(self_conditioning=True), {"in_channels": 2}),
    "an image": (Diffusion(clip_sample_range=None), {"in_channels": 3}),
    "a range of guidance": (RANGE, {"time_cond_dim": 8}),
}


def ours(made, folder):
    """Sample by this package from the README's noise, with the example's conditions."""
    example = {name: torch.from_numpy(value) for name, value in np.load(folder / "example.npz").items()}
    names = ("class_labels", "vector", "context", "context_mask", "concat")
    given = {name: example[name] for name in names if name in example}
    guided = made.model.config.learned_null and made.model.config.conditions and made.process.distillation is None
    options = {"guidance_scale": 2.0} if guided else {}
    noise = first_noise(folder)
    config = made.sampling_config(**{"sampler": "ddim"} | options)
    start = Start(noise, add_noise=False)
    return sample(made.model, made.process, seeds=range(len(noise)), start=start, config=config, **given).numpy()


def close(found, wanted):
    assert np.abs(wanted).max() > 0.1
    assert found.dtype == np.float32
    return np.abs(found - wanted).max() < 2e-4 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_its_sampling_is_ours(tmp_path, monkeypatch, name):
    """The loop alone, for every kind of network; the tests below run engines."""
    process, options = CASES[name]
    made = pipeline(tmp_path / "run", process, **options)
    without_engine(monkeypatch, made.model)
    export_pipeline(made, tmp_path / "out", ExportConfig("torch", image_size=(8, 8), batch_size=2))
    assert close(run_sampling(tmp_path / "out", made.model), ours(made, tmp_path / "out"))


@pytest.mark.parametrize("to", ["openvino", "torch"])
def test_all_of_its_code_samples_by_an_engine(tmp_path, capsys, to):
    made = pipeline(tmp_path / "run", Diffusion(path="flow"), num_classes=5)
    export_pipeline(made, tmp_path / "out", ExportConfig(to, image_size=(8, 8), batch_size=2))
    run_readme(tmp_path / "out")
    assert float(capsys.readouterr().out.removeprefix("largest difference: ")) < 1e-5
    assert close(np.load(tmp_path / "out" / "samples.npy"), ours(made, tmp_path / "out"))


def test_it_says_what_a_reader_needs(tmp_path, monkeypatch):
    made = pipeline(tmp_path / "photos", num_classes=5)
    without_engine(monkeypatch, made.model)
    report = export_pipeline(made, tmp_path / "out", ExportConfig("torch"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    call, _ = readme_blocks(tmp_path / "out")
    assert len([line for line in call.splitlines() if line.strip()]) <= 14
    assert "# photos, exported" in text
    assert f"{report.error:.1e}" in text
    assert "| `class_labels` | int64 | (batch) | classes 0 to 4 |" in text
    assert "Classes, in the order of their labels: 0, 1, 2, 3, 4." in text
