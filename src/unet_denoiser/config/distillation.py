"""The options of distillation."""

from dataclasses import asdict, dataclass
from typing import Any

from unet_denoiser.config.base import check_minimum, check_types
from unet_denoiser.config.sampling import SamplingConfig, TimestepSpacing


@dataclass(frozen=True)
class DistillationConfig:
    """The steps of a distilled network, and the teacher's sampling that they stand for.

    Args:
        num_steps: steps of the distilled network, each as good as several of the teacher's.
        guidance_scale: weight of the teacher's classifier-free guidance, which the distilled network has without
            computing it; 1 is off. Two numbers are a range, from which sampling then chooses with its own
            guidance_scale.
        teacher_steps: steps of the teacher from noise to data, by dpm++; a multiple of num_steps. With more of them the
            teacher is more exact, and a step of the training takes longer.
        timestep_spacing: of the teacher's steps, and so of the network's. "quadratic" has a last step that begins where
            details are hardly noise any more (default: "quadratic"; "trailing" with process.path "edm", whose levels
            are close there anyway). A file without it is of a network with "trailing".

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    num_steps: int = 4
    guidance_scale: float | tuple[float, float] = 1.0
    teacher_steps: int = 16
    timestep_spacing: TimestepSpacing | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "num_steps")
        if self.teacher_steps % self.num_steps or self.teacher_steps < 2 * self.num_steps:
            raise ValueError(
                f"teacher_steps={self.teacher_steps} must be a multiple of num_steps={self.num_steps}, at least twice "
                f"as many; for example {4 * self.num_steps}"
            )
        low, high = self.guidance_range
        if not 0 <= low <= high < 1000 or (self.draws_guidance and low == high):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} must be a number of at least 0, or two of them, the lower one "
                "first; 1 is off"
            )

    @property
    def draws_guidance(self) -> bool:
        """True if the guidance scale is an input of the distilled network, embedded as its `time_cond`."""
        return isinstance(self.guidance_scale, tuple)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The lowest and the highest guidance scale."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,) * 2

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `SamplingConfig` for the distilled network; in a range of guidance, its middle."""
        scale = sum(self.guidance_range) / 2 if self.draws_guidance else 1.0
        return {
            "sampler": "ddim",
            "num_inference_steps": self.num_steps,
            "timestep_spacing": self.timestep_spacing or "trailing",
            "guidance_scale": scale,
            "clip_sample": False,  # the x0 of a step that skips several is none of the data's
        }

    def check_sampling(self, config: SamplingConfig) -> None:
        """Raise ValueError for options that the network was not distilled for; those of speed alone are free."""
        valid, given = asdict(SamplingConfig(**self.sampling)), asdict(config)
        low, high = self.guidance_range
        for name, value in given.items():
            if name == "guidance_scale" and self.draws_guidance:
                if not low <= value <= high:
                    raise ValueError(f"guidance_scale={value}: this network was distilled for {low:g} to {high:g}")
            elif value != valid[name] and name not in ("compile", "backend", "backend_precision"):
                raise ValueError(f"{name}={value!r}: {self.describe()}; leave it out, or give {valid[name]!r}")

    def describe(self) -> str:
        """Say what a network was distilled for."""
        return f"this network was distilled for {self.describe_steps()}"

    def describe_steps(self) -> str:
        """Return the number of steps and the guidance in words."""
        steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
        low, high = self.guidance_range
        guided = f"guidance of {low:g} to {high:g}" if self.draws_guidance else f"guidance of {low:g} built in"
        return f"{steps} of ddim with {guided}"
