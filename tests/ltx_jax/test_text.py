"""Prompts to tokens, hidden states and contexts, against the miniature release."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from convert.tables.connectors import CONNECTORS, PREFIXES
from convert.tables.gemma import GEMMA
from ltx_jax.config import GemmaConfig, TextConnectorsConfig
from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.gemma import Gemma
from ltx_jax.stack import stack_layers
from ltx_jax.text import TextError, encode_prompts, load_tokenizer, text_contexts, text_hidden_states, tokenize
from tests.conftest import DATA, fill, read_prefix

RELEASE = DATA / "mini-release"
GEMMA_FOLDER = RELEASE / "gemma-3-mini"
NAMES = ("prompt0", "prompt1", "prompt2", "negative")

# A float32 pass through text encoder and connectors; disturbing the embedding by 1e-6 moves the contexts by 1.4e-5.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    found = json.loads((RELEASE / "reference/prompts.json").read_text())
    return [*found["prompts"], found["negative"]]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(RELEASE / "reference/text.safetensors")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GEMMA_FOLDER, vocab_size=1024)


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    config = GemmaConfig.from_metadata(json.loads((GEMMA_FOLDER / "config.json").read_text()))
    shards = sorted(GEMMA_FOLDER.glob("*.safetensors"))
    tensors = {k: v for shard in shards for k, v in read_prefix(shard, "language_model.model.").items()}
    model: Any = fill(lambda: Gemma(config, rngs=nnx.Rngs(0)), GEMMA, tensors)
    model.layers = stack_layers(model.layers)
    return model


@pytest.fixture(scope="module")
def connectors() -> TextConnectors:
    path = RELEASE / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    with safe_open(path, "np") as file:
        section = json.loads(file.metadata()["config"])["transformer"]
    config = TextConnectorsConfig.from_metadata(section, num_hidden_states=7)
    tensors = {name: tensor for name, tensor in read_prefix(path, "").items() if name.startswith(PREFIXES)}
    model: Any = fill(lambda: TextConnectors(config, rngs=nnx.Rngs(0)), CONNECTORS, tensors)
    return model


@pytest.fixture
def variant(tmp_path) -> Callable[..., Path]:
    """A copy of the tokenizer's folder with entries of its two files changed; None removes an entry."""

    def make(tokenizer: dict | None = None, config: dict | None = None) -> Path:
        for name, changes in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            content = json.loads((GEMMA_FOLDER / name).read_text()) | (changes or {})
            content = {k: v for k, v in content.items() if v is not None}
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return make


# Tokens


def test_tokens_agree_with_the_reference(tokenizer, prompts, expected):
    for name, prompt in zip(NAMES, prompts, strict=True):
        encoded = tokenizer.encode(prompt)
        np.testing.assert_array_equal(encoded.token_ids, expected[f"in.{name}.input_ids"], err_msg=name)
        np.testing.assert_array_equal(encoded.mask, expected[f"in.{name}.attention_mask"].astype(bool), err_msg=name)


def test_an_empty_prompt_is_one_token(tokenizer):
    assert tokenizer.encode(" \n ").token_ids[-2:].tolist() == [tokenizer.pad_id, tokenizer.bos_id]


def test_white_space_around_a_prompt_does_not_matter(tokenizer):
    assert tokenizer.encode("\n a dog \t").token_ids.tolist() == tokenizer.encode("a dog").token_ids.tolist()


def test_what_a_long_prompt_loses_is_told(tokenizer, prompts):
    encoded = tokenizer.encode(prompts[2])
    assert encoded.mask.all()
    assert encoded.dropped_text.startswith(" knock against the wooden hull, and far away a bell rings twice.")
    assert prompts[2].endswith(encoded.dropped_text)
    # What was kept gives the same tokens on its own, and just fits.
    kept = tokenizer.encode(prompts[2].removesuffix(encoded.dropped_text))
    assert kept.dropped_text == ""
    assert kept.token_ids.tolist() == encoded.token_ids.tolist()
    with pytest.warns(UserWarning, match=r"In a quiet harbour.*longer than 64 tokens.*' knock against"):
        tokenize(tokenizer, prompts)


def test_fitting_prompts_give_no_warning(tokenizer, prompts, recwarn):
    token_ids, mask = tokenize(tokenizer, prompts[:2])
    assert token_ids.shape == mask.shape == (2, 64)
    assert not recwarn.list


@pytest.mark.parametrize("template", ["with", "without"])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_begin_of_sequence_stands_once_or_as_the_configuration_says(variant, tokenizer, template, add_bos):
    folder = variant({} if template == "with" else {"post_processor": None}, {"add_bos_token": add_bos})
    found = load_tokenizer(folder).encode("a dog")
    plain = tokenizer.encode("a dog").token_ids.tolist()
    if add_bos is False:
        assert found.token_ids[found.mask].tolist() == [i for i in plain if i not in (0, 2)]
    else:
        assert found.token_ids.tolist() == plain
        assert plain.count(tokenizer.bos_id) == 1


def test_a_written_begin_of_sequence_is_not_doubled(tokenizer):
    assert tokenizer.encode("<bos>a dog").token_ids.tolist() == tokenizer.encode("a dog").token_ids.tolist()


def test_lengths_stored_with_the_tokenizer_are_ignored(variant, tokenizer, prompts):
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    other = load_tokenizer(variant({"truncation": truncation, "padding": padding}))
    for prompt in prompts:
        assert other.encode(prompt).token_ids.tolist() == tokenizer.encode(prompt).token_ids.tolist()


@pytest.mark.parametrize(("limit", "length"), [(None, 1024), (1e30, 1024), (10**30, 1024), (2048, 1024), (96, 96)])
def test_text_length_is_the_limit_of_the_tokenizer_but_at_most_1024(variant, limit, length):
    tokenizer = load_tokenizer(variant(config={"model_max_length": limit}))
    assert tokenizer.text_length == length
    assert tokenizer.encode("a dog").token_ids.shape == (length,)


def test_a_folder_with_tokenizer_json_alone_is_enough(tmp_path):
    shutil.copy(GEMMA_FOLDER / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.text_length, tokenizer.bos_id, tokenizer.pad_id) == (1024, 2, 0)


def test_special_tokens_may_be_given_as_dictionaries(variant):
    tokenizer = load_tokenizer(variant(config={"bos_token": {"content": "<unk>"}, "pad_token": {"content": "<eos>"}}))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (3, 1)


def test_unusable_tokenizers_are_refused(variant, tmp_path):
    with pytest.raises(TextError, match=r"no tokenizer\.json in .*expected the folder of Gemma 3"):
        load_tokenizer(tmp_path)
    with pytest.raises(TextError, match=r"'<padding>'.*which has <bos> and <pad>"):
        load_tokenizer(variant(config={"pad_token": "<padding>"}))
    with pytest.raises(TextError, match="ids up to 1023, but the text encoder only embeds ids below 96"):
        load_tokenizer(variant(), vocab_size=96)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TextError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_prompts_must_be_a_list_of_texts(tokenizer):
    for prompts in ("a dog", []):
        with pytest.raises(TextError, match="a list with at least one text"):
            tokenize(tokenizer, prompts)


# Hidden states and contexts


def test_hidden_states_agree_with_the_reference(gemma, tokenizer, prompts, expected):
    token_ids, mask = tokenize(tokenizer, prompts[1:2])
    states = text_hidden_states(gemma, token_ids, mask, dtype=jnp.float32)
    assert states.dtype == jnp.float32  # the weights are bfloat16
    valid = np.asarray(mask[0])
    reference = expected["out.prompt1.hidden_states"]
    np.testing.assert_allclose(states[:, 0, valid], reference[:, valid], atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore:the prompt")
def test_contexts_agree_with_the_reference(gemma, connectors, tokenizer, prompts, expected):
    contexts = encode_prompts(gemma, connectors, tokenizer, prompts, jnp.float32)
    for i, name in enumerate(NAMES):
        for stream in ("video", "audio"):
            reference = expected[f"out.{name}.{stream}_context"][0]
            found = getattr(contexts, stream)[i]
            np.testing.assert_allclose(found, reference, atol=TOLERANCE, rtol=0, err_msg=f"{name} {stream}")


@pytest.mark.filterwarnings("ignore:the prompt")
def test_stages_on_a_batch_agree_with_one_prompt_at_a_time(gemma, connectors, tokenizer, prompts, expected):
    token_ids, mask = tokenize(tokenizer, prompts)
    states = text_hidden_states(gemma, token_ids, mask, dtype=jnp.float32)
    contexts = text_contexts(connectors, states, mask)
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(
            contexts.video[i], expected[f"out.{name}.video_context"][0], atol=TOLERANCE, rtol=0, err_msg=name
        )


def test_bfloat16_contexts_are_as_near_as_those_of_the_reference(gemma, connectors, tokenizer, prompts, expected):
    contexts = encode_prompts(gemma, connectors, tokenizer, prompts[1:2], jnp.bfloat16)
    reference = load_file(RELEASE / "reference/gen_a_distilled_bf16.safetensors")
    for stream in ("video", "audio"):
        found = getattr(contexts, stream)
        assert found.dtype == jnp.bfloat16
        exact = expected[f"out.prompt1.{stream}_context"]
        theirs = np.asarray(reference[f"in.{stream}_context"], np.float32) - exact
        ours = np.asarray(found, np.float32) - exact
        assert np.sqrt(np.mean(ours**2)) < 1.5 * np.sqrt(np.mean(theirs**2))


def test_models_that_do_not_belong_together_are_refused(gemma, connectors, tokenizer):
    config = replace(connectors.config, num_hidden_states=49, hidden_dim=3840)
    other = nnx.eval_shape(lambda: TextConnectors(config, rngs=nnx.Rngs(0)))
    with pytest.raises(
        TextError, match="7 hidden states of width 36, but the connectors were made for 49 of width 3840"
    ):
        encode_prompts(gemma, other, tokenizer, ["a dog"], jnp.float32)


def test_a_text_length_that_the_registers_do_not_divide_is_refused(gemma, connectors, tokenizer):
    short = replace(tokenizer, text_length=40)
    with pytest.raises(ValueError, match=r"multiple of 16 tokens.*got 40"):
        encode_prompts(gemma, connectors, short, ["a dog"], jnp.float32)
