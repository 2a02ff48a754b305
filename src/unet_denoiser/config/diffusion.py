"""The options of the diffusion process."""

import math
from dataclasses import dataclass

from unet_denoiser.config.base import BetaSchedule, PredictionType, VarianceType, check_minimum, check_types


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts.

    Args:
        num_train_timesteps: T; timesteps go from 0 (almost clean) to T - 1 (almost pure noise).
        beta_schedule: "linear" (DDPM), "scaled_linear" (Stable Diffusion), "squaredcos_cap_v2" (cosine) or "sigmoid".
        beta_start: the first beta; the cosine schedule ignores it.
        beta_end: the last beta; the cosine schedule ignores it.
        prediction_type: what the network predicts: "epsilon" (the noise; Ho et al. 2020), "v_prediction"
            (alpha eps - sigma x0; Salimans and Ho 2022) or "sample" (x0).
        clip_sample_range: r for data in [-r, r], to which predicted x0 are clipped; None for unbounded data (latents).
        rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023); not with "epsilon", which does not
            determine x0 there.
        variance_type: variance of a step of the ddpm sampler: "fixed_small" (the posterior's), "fixed_large" (beta) or
            "learned_range" (the network predicts it in a second half of its output channels; Nichol and Dhariwal
            2021).
        self_conditioning: feed the network its previous estimate of x0 in additional input channels (Chen et al. 2022).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: PredictionType = "v_prediction"
    clip_sample_range: float | None = 1.0
    rescale_betas_zero_snr: bool = False
    variance_type: VarianceType = "fixed_small"
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "num_train_timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must be 0 < start <= end < 1")
        if self.clip_sample_range is not None and not 0 < self.clip_sample_range < math.inf:
            raise ValueError(
                f"clip_sample_range={self.clip_sample_range} must be positive and finite, or None for unbounded data"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' with rescale_betas_zero_snr=True: at the last timestep, predicted noise "
                "does not determine x0; use 'v_prediction' or 'sample'"
            )
        if self.variance_type == "learned_range" and self.num_train_timesteps < 2:
            raise ValueError("variance_type='learned_range' has no range with num_train_timesteps=1; use 'fixed_small'")
