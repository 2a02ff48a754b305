"""The frozen text encoders of a published pipeline: captions to the tokens that its network was trained with."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.models.fetch import PIPELINE_NAME
from unet_denoiser.models.text_encoder import Prompt, TextEncoder, use_transformers
from unet_denoiser.utils.cache import digest, fingerprint
from unet_denoiser.utils.files import read_json

# the folders of a tokenizer and its encoder, in the order in which SDXL joins their tokens
_PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer", "bert"))
_LENGTH = 77  # tokens of a caption, in all these pipelines


class PromptEncoder(TextEncoder):
    """The text encoders of Stable Diffusion and its kin, as their networks know them.

    Every caption is padded to `max_length` tokens, all of which count, padding included. SDXL's tokens are the hidden
    states before the last layer, of both encoders side by side; its second encoder gives a vector for the caption too.

    Args:
        folder: of a pipeline, with tokenizers and text encoders; or of a single text encoder with its tokenizer.
        max_length: tokens of a caption (default: the tokenizer's limit).

    Attributes:
        pooled_dim: width of the vector of a caption; None if there is none.

    Raises:
        FileNotFoundError, ValueError: an encoder that cannot be loaded.
        ImportError: transformers is not installed.
    """

    def __init__(self, folder: str | Path, max_length: int | None = None) -> None:
        place = Path(folder)
        self.pooled_dim: int | None = None
        if not (place / PIPELINE_NAME).is_file():
            super().__init__(folder, max_length)
            self.tokenizers = [self.tokenizer]
            return
        self.name, self.num_cut, self._model = str(folder), 0, None
        index = read_json(place / PIPELINE_NAME)
        found = [names for names in _PARTS if (index.get(names[1]) or [None])[0] is not None]
        if not found:
            raise ValueError(f"text_encoder={folder}: the pipeline has no text encoder")
        with use_transformers(f"text_encoder={folder}", "text encoder") as transformers:
            self.tokenizers = [getattr(transformers, index[name][1]).from_pretrained(place / name) for name, _ in found]
        self._encoders = [(place / name, *index[name]) for _, name in found]
        configs = [read_json(path / "config.json") for path, *_ in self._encoders]
        self.context_dim = sum(int(config.get("hidden_size") or config["d_model"]) for config in configs)
        if found[-1][1] == "text_encoder_2":
            self.pooled_dim = int(configs[-1]["projection_dim"])
        limit = self.tokenizers[0].model_max_length
        self.max_length = max_length or (limit if limit <= 10**6 else _LENGTH)
        self.key = digest([fingerprint([path for path, *_ in self._encoders]), str(self.max_length)])

    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """Return each caption's tokens (max_length, context_dim) float32."""
        return [prompt.tokens for prompt in self.encode(captions)]

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[Prompt]:
        """Encode captions, which do not depend on each other."""
        if self._model is None:
            self._model = self._load()
        captions = list(captions)
        self.num_cut += sum(len(ids) > self.max_length for ids in self.tokenizers[0](captions)["input_ids"])
        hidden, pooled = [], None
        for tokenizer, model in zip(self.tokenizers, self._model, strict=True):
            options = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
            inputs = tokenizer(captions, **options, return_tensors="pt")
            mask = inputs["attention_mask"] if getattr(model.config, "use_attention_mask", False) else None
            masks = {} if mask is None else {"attention_mask": mask}
            output = model(inputs["input_ids"], output_hidden_states=self.pooled_dim is not None, **masks)
            hidden.append(output[0] if self.pooled_dim is None else output.hidden_states[-2])
            pooled = output[0]
        tokens = torch.cat(hidden, dim=-1).float().clone()  # (B, max_length, context_dim)
        vectors = [None] * len(captions) if self.pooled_dim is None or pooled is None else list(pooled.float().clone())
        return [Prompt(*both) for both in zip(tokens, vectors, strict=True)]

    def _load(self) -> Any:
        """Load the encoders, in the order of their tokenizers."""
        if not hasattr(self, "_encoders"):
            return [super()._load()]
        with use_transformers(f"text_encoder={self.name}", "text encoder"):
            return [_load_encoder(*encoder) for encoder in self._encoders]


def _load_encoder(folder: Path, library: str, name: str) -> Any:
    """Load a text encoder of transformers, or LDM's, which diffusers has; only half-precision files if no others."""
    module = import_module("diffusers.pipelines.latent_diffusion" if library == "latent_diffusion" else "transformers")
    halves = list(folder.glob("*.fp16.*"))
    variant = {"variant": "fp16"} if halves and not any(folder.glob("*model.[sb]*")) else {}
    model = getattr(module, name).from_pretrained(folder, dtype=torch.float32, **variant)
    return model.eval().requires_grad_(False)
