"""Evaluation: metrics of samples, a search for copies, and the diagnosis of a run."""

from unet_denoiser.evaluation.evaluator import evaluate as evaluate
from unet_denoiser.evaluation.feature_extractors import load_extractor as load_extractor
from unet_denoiser.evaluation.metrics import frechet_distance as frechet_distance
from unet_denoiser.evaluation.metrics import kernel_distance as kernel_distance
