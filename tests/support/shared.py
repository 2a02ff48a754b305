"""Small runs of every kind that can be shared, and the code of their cards."""

from pathlib import Path

import numpy as np

from support.autoencoders import small_kl
from support.commands import TINY
from support.documents import blocks
from unet_denoiser import Run
from unet_denoiser.cli.app import main

DIGITS = ["digits", *TINY]
KINDS = {  # arguments of `train`; {data} are images without classes
    "classes": DIGITS,
    "flow": [*DIGITS, "--process.path", "flow"],
    "edm": [*DIGITS, "--process.path", "edm"],
    "pixels": ["{data}", *TINY],
    "flow pixels": ["{data}", *TINY, "--process.path", "flow"],
    "learned variance": ["{data}", *TINY, "--process.variance-type", "learned_range"],
    "latents": [*DIGITS, "--vae", "{vae}"],
    "standardised latents": ["{data}", *TINY, "--vae", "{vae}", "--standardize-latents"],
    "vectors": ["{vectors}", *TINY],
    "second image": ["{data}", *TINY, "--concat", "downscaled:2"],
}


def make_run(folder: Path, kind: str) -> Run:
    """Train a small run of a kind for three steps; "distilled" and "distilled ..." are students of others."""
    if kind.startswith("distilled"):
        teacher = make_run(folder / "teacher", "pixels" if kind.endswith("pixels") else "classes")
        guidance = [] if kind.endswith("pixels") else ["--guidance-scale", "2"]
        spacing = ["--timestep-spacing", "trailing"] if kind.endswith("trailing") else []
        student = ["--num-steps", "4", "--teacher-steps", "8", "--steps", "2", *guidance, *spacing]
        main(["distill", str(teacher.path), "--out", str(folder / "run"), *student])
        return Run.load(folder / "run")
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8), np.uint8)
    np.savez(folder / "data.npz", images=images)
    np.savez(folder / "vectors.npz", images=images, vectors=np.linspace(0, 1, 24, dtype=np.float32).reshape(12, 2))
    small_kl(scaling_factor=0.5).save_pretrained(folder / "kl")
    places = {"data": folder / "data.npz", "vectors": folder / "vectors.npz", "vae": folder / "kl"}
    main(["train", *(word.format(**places) for word in KINDS[kind]), "--out", str(folder / "run")])
    return Run.load(folder / "run")


def run_code(folder: Path) -> list[dict]:
    """Run the Python of a card, each block in a namespace of its own, in the working directory; return these."""
    spaces = []
    for code in blocks(folder / "README.md", "python"):
        spaces.append({})
        exec(compile(code, str(folder / "README.md"), "exec"), spaces[-1])
    return spaces
