"""Three ways to train on images without conditions: this library's, and those that two others recommend.

Each has its library's own network, process, optimizer, schedule and averaging, at about 1.1 million parameters. All
take images from memory instead of files, and none flips them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from lucidrains import GaussianDiffusion, Unet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unet_denoiser import ArrayDataset, Diffusion, Trainer, TrainingConfig, UNet, sample
from unet_denoiser.config.defaults import architecture_for

BATCH_SIZE = 100  # samples at a time
NUM_SHORT_STEPS = 50  # steps of the peers' own samplers, instead of 1000


class Side:
    """A way to train: `begin`, then any number of `step`; `averaged` returns weights for a network that samples."""

    name: str
    own_sampler: str

    def __init__(self, images: Tensor) -> None:
        self.images = images  # (N, C, H, W) in [-1, 1]

    def begin(self, steps: int) -> None:
        """Start a new training of this many steps."""
        raise NotImplementedError

    def step(self) -> bool:
        """Do an optimizer step; return False if all are done."""
        raise NotImplementedError

    def averaged(self) -> dict[str, Tensor]:
        """Return a copy of the averaged weights."""
        raise NotImplementedError

    def sample_own(self, weights: dict[str, Tensor], seed: int) -> Tensor:
        """Make BATCH_SIZE samples with the library's own sampler."""
        raise NotImplementedError

    def sample_shared(self, weights: dict[str, Tensor], seed: int, steps: int) -> Tensor:
        """Make BATCH_SIZE samples from a seed with diffusers' DDIM, for this side's noise levels and prediction."""
        scheduler = DDIMScheduler(**self.schedule(), timestep_spacing="trailing", clip_sample=True)
        scheduler.set_timesteps(steps)
        network, x = self.network(weights), torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            for t in scheduler.timesteps:
                output = network(x, t.expand(len(x)))
                x = scheduler.step(getattr(output, "sample", output), t, x, use_clipped_model_output=True).prev_sample
        return x.clone()

    def schedule(self) -> dict[str, Any]:
        """Return the noise levels (as betas) and the prediction type, as diffusers' schedulers take them."""
        raise NotImplementedError

    def network(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return the network with these weights, in evaluation mode."""
        model = self.architecture()
        model.load_state_dict(weights)
        return model.eval()

    def architecture(self) -> nn.Module:
        """Return the network with random weights."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return (BATCH_SIZE, *self.images.shape[1:])

    def _batches(self, size: int) -> Iterator[Tensor]:
        loader = DataLoader(TensorDataset(self.images), size, shuffle=True, drop_last=True)
        while True:
            yield from (batch for (batch,) in loader)


class Ours(Side):
    """`unet-denoiser train` with its defaults but for the size of the network, and `sample` with its defaults."""

    name, own_sampler = "unet-denoiser", "dpm++, 25 steps"

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.process = Diffusion()

    def architecture(self) -> UNet:
        size = {"model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1}
        return UNet.from_config(architecture_for(self.shape[1], self.shape[2:], None, size))

    def begin(self, steps: int) -> None:
        torch.manual_seed(0)
        self.trainer = Trainer(
            self.architecture(),
            self.process,
            ArrayDataset(self.images.numpy()),
            TrainingConfig(steps=steps, device="cpu"),
        )
        self._steps = self.trainer.steps()

    def step(self) -> bool:
        return next(self._steps, None) is not None

    def averaged(self) -> dict[str, Tensor]:
        with self.trainer.ema.swapped():
            return {name: value.clone() for name, value in self.trainer.model.state_dict().items()}

    def sample_own(self, weights: dict[str, Tensor], seed: int) -> Tensor:
        return sample(self.network(weights), self.process, seeds=range(seed, seed + BATCH_SIZE), batch_size=BATCH_SIZE)

    def schedule(self) -> dict[str, Any]:
        scheduler = self.process.scheduler
        return {"trained_betas": scheduler.betas.numpy(), "prediction_type": scheduler.config.prediction_type}


class Lucidrains(Side):
    """denoising-diffusion-pytorch: Unet, GaussianDiffusion and Trainer with their defaults, the last level left out.

    The trainer imports torchvision, so its step is written out here: batch size 16, Adam 1e-4 with betas
    (0.9, 0.99), gradients clipped to 1, an average with decay 0.995 updated every 10 steps.
    """

    name, own_sampler = "denoising-diffusion-pytorch", f"ddim, {NUM_SHORT_STEPS} steps"

    def architecture(self) -> nn.Module:
        return Unet(20, channels=self.shape[1], dim_mults=(1, 2, 4))

    def _process(self, network: nn.Module, **options: Any) -> Any:
        return GaussianDiffusion(network, image_size=self.shape[2], **options)

    def begin(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = self._process(self.architecture())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.ema = EMA(self.model, beta=0.995, update_every=10)
        self._data = self._batches(16)

    def step(self) -> bool:
        self.model.train()
        self.model((next(self._data) + 1) / 2).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return True

    def averaged(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.ema.ema_model.model.state_dict().items()}

    def sample_own(self, weights: dict[str, Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        process = self._process(self.network(weights), sampling_timesteps=NUM_SHORT_STEPS).eval()
        return process.sample(BATCH_SIZE) * 2 - 1

    def schedule(self) -> dict[str, Any]:
        process = self._process(self.architecture())
        kinds = {"pred_v": "v_prediction", "pred_noise": "epsilon", "pred_x0": "sample"}
        return {"trained_betas": process.betas.numpy(), "prediction_type": kinds[process.objective]}


class Diffusers(Side):
    """The unconditional training example of diffusers, as its README runs it.

    Batch size 16, AdamW 1e-4 with betas (0.95, 0.999) and weight decay 1e-6, a warm-up of 500 steps and a cosine,
    gradients clipped to 1, epsilon on the linear schedule, --use_ema with its warmed-up decay of at most 0.9999. The
    network is the first, second and fifth of its six resolution levels, at a quarter of the width and with as many
    channels in a group.
    """

    name, own_sampler = "diffusers", f"ddpm, {NUM_SHORT_STEPS} steps"

    def architecture(self) -> UNet2DModel:
        return UNet2DModel(
            sample_size=self.shape[2],
            in_channels=self.shape[1],
            out_channels=self.shape[1],
            layers_per_block=2,
            block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def begin(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model, self.scheduler = self.architecture(), DDPMScheduler()
        weights = self.model.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=500, num_training_steps=steps)
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self._data = self._batches(16)

    def step(self) -> bool:
        self.model.train()
        x0 = next(self._data)
        noise, t = torch.randn_like(x0), torch.randint(0, len(self.scheduler.betas), (len(x0),))
        output = self.model(self.scheduler.add_noise(x0, noise, t), t).sample
        F.mse_loss(output, noise).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return True

    def averaged(self) -> dict[str, Tensor]:
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.ema.restore(self.model.parameters())
        return weights

    def sample_own(self, weights: dict[str, Tensor], seed: int) -> Tensor:
        pipeline = DDPMPipeline(self.network(weights), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            BATCH_SIZE,
            torch.Generator().manual_seed(seed),
            num_inference_steps=NUM_SHORT_STEPS,
            output_type="np",
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def schedule(self) -> dict[str, Any]:
        scheduler = DDPMScheduler()
        return {"trained_betas": scheduler.betas.numpy(), "prediction_type": scheduler.config.prediction_type}


SIDES = (Ours, Lucidrains, Diffusers)
