"""Captions as conditions: any text encoder of transformers, frozen, run once for each caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.utils.cache import digest, fingerprint

MAX_TOKENS = 512  # where a tokenizer states no limit


class TextEncoder:
    """A frozen text encoder: captions to the tokens that cross-attention sees, its last hidden states.

    Args:
        name_or_path: a folder, or a hub name, that transformers loads: the text models of CLIP, T5's encoder, BERT and
            its like.
        max_length: longest caption in tokens, longer ones are cut (default: what the tokenizer states).

    Raises:
        ValueError, ImportError: what cannot be loaded, in one line.
    """

    def __init__(self, name_or_path: str | Path, max_length: int | None = None) -> None:
        self.name = str(name_or_path)
        if self.name.startswith(("/", ".", "~")) and not Path(self.name).is_dir():
            raise FileNotFoundError(f"text_encoder={self.name} is no folder; give one, or a hub name")
        transformers = _transformers()
        with _one_reason(self.name):
            config = transformers.AutoConfig.from_pretrained(self.name)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.name)
        text = getattr(config, "text_config", None) or config
        self.context_dim: int = text.hidden_size if hasattr(text, "hidden_size") else text.d_model
        stated = self.tokenizer.model_max_length
        self.max_length = max_length or (stated if stated <= 10**6 else MAX_TOKENS)
        place = Path(self.name)
        version = fingerprint([place]) if place.exists() else f"{self.name} {getattr(config, '_commit_hash', None)}"
        self.key = digest([version, str(self.max_length)])
        self._config = config
        self._model: Any = None  # loaded when it is needed: not where everything asked for is kept already

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`context` (B, S, context_dim) float32, zeros at padding, and `context_mask` (B, S) bool."""
        return padded(self.tokens(captions))

    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """The tokens of each caption, (its length, context_dim) float32: those of one caption, whatever the others.

        The values are rounded to float16, as the cache keeps them, so that training and sampling see the same.
        """
        if self._model is None:
            self._model = self._load()
        inputs = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            hidden = self._model(**arguments).last_hidden_state.half().float()
        if not hidden.isfinite().all():
            raise ValueError(f"text_encoder={self.name}: its values do not fit float16")
        masks = arguments["attention_mask"].bool()
        return [tokens[mask].clone() for tokens, mask in zip(hidden, masks, strict=True)]

    def _load(self) -> Any:
        transformers = _transformers()
        known = type(self._config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        with _one_reason(self.name):
            auto = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
            model = auto.from_pretrained(self.name, dtype=torch.float32)
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            model = model.get_encoder()
        model = getattr(model, "text_model", model)  # CLIP's model of both text and images
        return model.eval().requires_grad_(False)


def padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`context` (B, S, D), zeros behind the end of shorter ones, and `context_mask` (B, S) of rows of tokens."""
    lengths = torch.tensor([len(t) for t in tokens])
    context = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    return context, torch.arange(context.shape[1]) < lengths[:, None]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("text_encoder needs transformers: pip install 'unet-denoiser[text]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def _one_reason(name: str) -> Iterator[None]:
    """Whatever transformers says of an encoder that it cannot load, as one ValueError."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ... as the case may be
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"text_encoder={name} cannot be loaded ({reason}); give a folder or hub name of a transformers text encoder"
        ) from error
