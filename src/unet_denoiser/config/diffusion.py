"""The options of the diffusion process."""

import math
from dataclasses import dataclass, fields

from unet_denoiser.config.base import BetaSchedule, DensityName, PathName, VarianceType, check_minimum, check_types

PATH_DEFAULTS: dict[PathName, tuple[str, DensityName]] = {  # prediction type and density of the training times
    "vp": ("v_prediction", "uniform"),
    "flow": ("flow", "logit_normal"),
    "edm": ("edm", "log_normal"),
}
DENSITY_DEFAULTS: dict[DensityName, tuple[float, float]] = {"logit_normal": (0.0, 1.0), "log_normal": (-1.2, 1.2)}
PATH_OPTIONS: dict[PathName, tuple[str, ...]] = {
    "vp": ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr"),
    "flow": ("shift",),
    "edm": ("sigma_min", "sigma_max", "rho", "sigma_data"),
}


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts.

    Args:
        num_train_timesteps: T; timesteps go from 0 (almost clean) to T - 1 (almost pure noise).
        beta_schedule: "linear" (DDPM), "scaled_linear" (Stable Diffusion), "squaredcos_cap_v2" (cosine) or "sigmoid".
        beta_start: the first beta; the cosine schedule ignores it.
        beta_end: the last beta; the cosine schedule ignores it.
        prediction_type: what the network predicts: "epsilon" (the noise; Ho et al. 2020), "v_prediction"
            (alpha eps - sigma x0; Salimans and Ho 2022), "sample" (x0), "flow" (eps - x0; Lipman et al. 2023) or "edm"
            (Karras et al. 2022) (default: "v_prediction" for the path "vp", else as the path's name).
        clip_sample_range: r for data in [-r, r], to which predicted x0 are clipped; None for unbounded data (latents).
        rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023); not with "epsilon", which does not
            determine x0 there.
        variance_type: variance of a step of the ddpm sampler: "fixed_small" (the posterior's), "fixed_large" (beta) or
            "learned_range" (the network predicts it in a second half of its output channels; Nichol and Dhariwal
            2021).
        self_conditioning: feed the network its previous estimate of x0 in additional input channels (Chen et al. 2022).
        path: the noise levels: "vp" (from betas, as in DDPM), "flow" (flow matching: (1 - t) x0 + t eps; Lipman et al.
            2023) or "edm" (x0 + sigma eps; Karras et al. 2022).
        shift: of "flow": moves the levels towards noise, for large images: t becomes shift t / (1 + (shift - 1) t), as
            in Stable Diffusion 3 with 3.
        sigma_min: of "edm": the lowest sigma.
        sigma_max: of "edm": the highest sigma.
        rho: of "edm": the levels are evenly spaced in sigma^(1 / rho).
        sigma_data: of "edm": standard deviation of the data.
        density: how often training draws each level: "uniform", or normal in the logarithm of sigma / alpha, which is
            "logit_normal" (Esser et al. 2024; in t before the shift) or "log_normal" (Karras et al. 2022); they
            differ in their default mean and standard deviation (default: that of the path's authors).
        density_mean: mean of a normal density (default: 0 for "logit_normal", -1.2 for "log_normal").
        density_std: standard deviation of a normal density (default: 1 for "logit_normal", 1.2 for "log_normal").
        density_table: instead of `density`: how often training draws from each of N equal ranges of the levels,
            relative to each other, the least noisy first.

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: str | None = None
    clip_sample_range: float | None = 1.0
    rescale_betas_zero_snr: bool = False
    variance_type: VarianceType = "fixed_small"
    self_conditioning: bool = False
    path: PathName = "vp"
    shift: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    density: DensityName | None = None
    density_mean: float | None = None
    density_std: float | None = None
    density_table: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        defaults = {field.name: field.default for field in fields(self)}
        for path, options in PATH_OPTIONS.items():
            for name in options:
                if path != self.path and (value := getattr(self, name)) != defaults[name]:
                    raise ValueError(f"{name}={value!r} is an option of path={path!r}; leave it out with {self.path!r}")
        self._check_density()
        prediction_type, density = PATH_DEFAULTS[self.path]
        object.__setattr__(self, "prediction_type", self.prediction_type or prediction_type)
        if self.density_table is None:
            object.__setattr__(self, "density", self.density or density)
        check_minimum(self, 1, "num_train_timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must be 0 < start <= end < 1")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must be 0 < min < max < inf")
        for name in ("shift", "rho", "sigma_data"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.clip_sample_range is not None and not 0 < self.clip_sample_range < math.inf:
            raise ValueError(
                f"clip_sample_range={self.clip_sample_range} must be positive and finite, or None for unbounded data"
            )
        self._check_prediction_type()
        if self.variance_type == "learned_range" and self.num_train_timesteps < 2:
            raise ValueError("variance_type='learned_range' has no range with num_train_timesteps=1; use 'fixed_small'")

    def _check_prediction_type(self) -> None:
        """Raise ValueError for a prediction type that does not determine x0, or that diffusers takes for another."""
        if self.prediction_type == "epsilon" and self.rescale_betas_zero_snr:
            raise ValueError(
                "prediction_type='epsilon' with rescale_betas_zero_snr=True: at the last timestep, predicted noise "
                "does not determine x0; use 'v_prediction' or 'sample'"
            )
        if self.prediction_type == "epsilon" and self.path != "vp":
            default, _ = PATH_DEFAULTS[self.path]
            raise ValueError(f"prediction_type='epsilon' with path={self.path!r}: use {default!r}, or path='vp'")
        if self.prediction_type == "v_prediction" and self.path == "edm" and self.sigma_data != 1:
            raise ValueError(
                f"sigma_data={self.sigma_data} with prediction_type='v_prediction' and path='edm' must be 1; or use "
                "prediction_type='edm'"
            )

    def _check_density(self) -> None:
        """Raise ValueError for options of the density that contradict each other, or a table that is none."""
        if (table := self.density_table) is not None:
            if self.density is not None:
                raise ValueError(f"density={self.density!r} and density_table={table} both say it; give one")
            if not table or not all(0 <= weight < math.inf for weight in table) or not any(table):
                raise ValueError(f"density_table={table} must be numbers of at least 0, not all 0, such as (1, 2, 1)")
        density = self.density or (None if table else PATH_DEFAULTS[self.path][1])
        for name in ("density_mean", "density_std"):
            value = getattr(self, name)
            if value is not None and density not in DENSITY_DEFAULTS:
                raise ValueError(f"{name}={value} needs density='logit_normal' or 'log_normal'")
            if value is not None and not (math.isfinite(value) and (value > 0 or name == "density_mean")):
                raise ValueError(f"{name}={value} must be finite" + " and above 0" * (name == "density_std"))
