"""bfloat16 beside float32: the loss in training, and samples in float32, bfloat16 and float16 with the same weights.

Network, data, noise and timesteps are the same. "another seed" is float32 with other initial weights, data order and
noise: a difference by chance. Run: python benchmarks/precision.py [--steps 1000]
"""

import argparse

import torch
from measure import format_machine, format_table, print_progress, read_machine

from unet_denoiser import Diffusion, Trainer, TrainingConfig, UNet, load_data, sample

NETWORK = {
    "in_channels": 1, "out_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (8, 4),
    "num_heads": 2, "context_dim": None, "image_size": 8, "num_classes": 10, "norm_groups": 8,
}  # fmt: skip


def train(steps: int, precision: str, seed: int) -> tuple[Trainer, torch.Tensor]:
    """Train, and return the trainer and the loss of every step."""
    torch.manual_seed(seed)
    config = TrainingConfig(
        steps=steps, batch_size=16, learning_rate=1e-3, mixed_precision=precision, seed=seed, device="cpu"
    )
    trainer = Trainer(UNet(**NETWORK), Diffusion(), load_data("digits"), config)
    return trainer, torch.stack([step.loss.cpu() for step in trainer.steps()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    print(format_machine(read_machine(), "python benchmarks/precision.py"))
    kinds = {"float32": ("no", 0), "bfloat16": ("bf16", 0), "float32, another seed": ("no", 1)}
    curves, trainers = {}, {}
    for name, (precision, seed) in kinds.items():
        trainers[name], curves[name] = train(options.steps, precision, seed)
        print_progress(f"{name}: mean of the last 100 losses", {"": float(curves[name][-100:].mean())})
    rows = []
    for part in torch.arange(options.steps).chunk(5):
        means = [f"{curve[part].mean():.5f}" for curve in curves.values()]
        errors = [f"{(curves[name][part] - curves['float32'][part]).mean():+.5f}" for name in list(kinds)[1:]]
        rows.append([f"{int(part[0]) + 1} to {int(part[-1]) + 1}", *means, *errors])
    print(format_table(["steps", *kinds, *(f"{name} - float32" for name in list(kinds)[1:])], rows))

    trainer = trainers["float32"]
    images = {}
    with trainer.ema.swapped():
        model = UNet.from_config(trainer.model.config)
        model.load_state_dict(trainer.model.state_dict())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        images[dtype] = sample(
            model.to(dtype), trainer.process, seeds=range(100), class_labels=torch.arange(100) % 10, guidance_scale=2.0
        )
    exact = images[torch.float32]
    rows = [
        [str(dtype).removeprefix("torch."), str(bool(x.isfinite().all())), *(f"{v:.4f}" for v in _compare(x, exact))]
        for dtype, x in images.items()
    ]
    head = ["sampling in", "finite", "mean difference", "largest", "mean", "standard deviation"]
    print("\n" + format_table(head, rows))


def _compare(x: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return mean and maximum of |x - exact|, and mean and standard deviation of x."""
    difference = (x - exact).abs()
    return difference.mean(), difference.max(), x.mean(), x.std()


if __name__ == "__main__":
    main()
