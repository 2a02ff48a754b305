"""A frozen text encoder of transformers: captions to the tokens that cross-attention attends to."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.paths import expand_home
from unet_denoiser.models.pretrained import describe_load_errors
from unet_denoiser.utils.cache import digest, fingerprint

MAX_TOKENS = 512  # if a tokenizer states no limit


class Prompt(NamedTuple):
    """An encoded caption: tokens (S, context_dim), and a vector (pooled_dim,) where the network takes one (SDXL)."""

    tokens: Tensor
    pooled: Tensor | None = None


class TextEncoder:
    """A frozen text encoder, whose last hidden states are the tokens for cross-attention.

    Args:
        name_or_path: a folder or hub name that transformers loads: a text model of CLIP, T5's encoder, BERT, ...
        max_length: tokens to which longer captions are cut (default: the tokenizer's limit).

    Attributes:
        num_cut: captions encoded so far that were longer.

    Raises:
        FileNotFoundError, ValueError: an encoder that cannot be loaded, or takes fewer tokens than `max_length`.
        ImportError: transformers is not installed.
    """

    def __init__(self, name_or_path: str | Path, max_length: int | None = None) -> None:
        self.name = expand_home(str(name_or_path))
        if self.name.startswith(("/", ".")) and not Path(self.name).is_dir():
            raise FileNotFoundError(f"text_encoder={self.name} is no folder; give one, or a hub name")
        with use_transformers(f"text_encoder={self.name}", "text encoder") as transformers:
            config = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        text = getattr(config, "text_config", None) or config
        self.context_dim: int = text.hidden_size if hasattr(text, "hidden_size") else text.d_model
        stated = self.tokenizer.model_max_length
        positions = getattr(text, "max_position_embeddings", None) or 0
        limit = stated if stated <= 10**6 else MAX_TOKENS
        if max_length is not None and 0 < positions < max_length:
            raise ValueError(f"caption_length={max_length}: {self.name} takes at most {positions} tokens")
        self.max_length = max_length or (min(limit, positions) if positions > 0 else limit)
        self.num_cut = 0
        place = Path(self.name)
        version = fingerprint([place]) if place.exists() else f"{self.name} {getattr(config, '_commit_hash', None)}"
        self.key = digest([version, str(self.max_length)])
        self._config = config
        self._model: Any = None  # loaded by the first caption whose tokens are not in the cache

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return `context` (B, S, context_dim) float32, zeros at padding, and `context_mask` (B, S) bool."""
        return pad_tokens(self.tokens(captions))

    def encode(self, captions: Sequence[str]) -> list[Prompt]:
        """Encode captions, which do not depend on each other."""
        return [Prompt(tokens) for tokens in self.tokens(captions)]

    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """Return each caption's tokens, (its length, context_dim) float32; they do not depend on the other captions.

        The values are rounded to float16, as in the cache, so that training and sampling see the same.

        Raises:
            ValueError: values that float16 cannot hold.
        """
        if self._model is None:
            self._model = self._load()
        self.num_cut += sum(len(ids) > self.max_length for ids in self.tokenizer(list(captions))["input_ids"])
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        inputs = self.tokenizer(list(captions), **options)
        ids, masks = inputs["input_ids"], inputs["attention_mask"]
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=masks).last_hidden_state.half().float()
        if not hidden.isfinite().all():
            raise ValueError(f"text_encoder={self.name}: its values do not fit float16")
        return [tokens[mask].clone() for tokens, mask in zip(hidden, masks.bool(), strict=True)]

    def warn_cut(self, num_cut: int, count: int) -> None:
        """Warn if captions, of `count` in all, are longer than the encoder takes."""
        if num_cut:
            found = f"{num_cut:,} of {count:,} captions are longer than the {self.max_length} tokens that"
            warnings.warn(f"{found} text_encoder={self.name} takes; what follows is cut off", stacklevel=3)

    def _load(self) -> Any:
        with use_transformers(f"text_encoder={self.name}", "text encoder") as transformers:
            known = type(self._config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
            auto = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
            model = auto.from_pretrained(self.name, dtype=torch.float32, trust_remote_code=False)
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            model = model.get_encoder()
        model = getattr(model, "text_model", model)  # CLIP's model of both text and images
        return model.eval().requires_grad_(False)


def pad_tokens(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad the tokens (length, D) of B captions: `context` (B, S, D), zeros at padding, and `context_mask` (B, S)."""
    lengths = torch.tensor([len(t) for t in tokens])
    context = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    return context, torch.arange(context.shape[1]) < lengths[:, None]


@contextmanager
def use_transformers(option: str, kind: str) -> Iterator[Any]:
    """Provide transformers for loading the model, a `kind` like "text encoder", of an option like "text_encoder=NAME".

    Raises:
        ImportError: transformers is not installed.
        ValueError: any error of the block, in one line that names the option.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{option} needs transformers: pip install 'unet-denoiser[text]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with describe_load_errors(option, f"a folder or hub name of a transformers {kind}"):
        yield transformers
