"""Gemma as a language model against transformers, and prompts that it writes."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, models

from convert.tables.gemma import GEMMA
from hlwq_jax import quantize_linears
from ltx_jax import enhance
from ltx_jax.cards import find_card
from ltx_jax.config import GemmaConfig
from ltx_jax.enhance import (
    BUCKET,
    candidates,
    chat_tokens,
    clean,
    enhance_prompt,
    generate,
    next_logits,
    read_on,
    sample,
)
from ltx_jax.memory import measure
from ltx_jax.models.gemma import Cache, Gemma
from ltx_jax.offload import HostLayers, Streamed
from ltx_jax.stack import stack_layers
from ltx_jax.text import PromptTokenizer, TextError, load_tokenizer
from tests.conftest import DATA, fill, read_prefix

RELEASE = DATA / "mini-release/gemma-3-mini"
REFERENCE = DATA / "gemma/generation.safetensors"
# Name -> configuration, files of weights, every how many logits were kept.
MODELS = {
    "release": (RELEASE / "config.json", sorted(RELEASE.glob("*.safetensors")), 16),
    "ltx": (DATA / "ltx/gemma_config.json", [DATA / "ltx/gemma.safetensors"], 1),
}

# A float32 pass, rounding of other summation orders, on logits of size 5. The likeliest token leads by 0.01 or more.
TOLERANCE = 2e-5


def load(name: str) -> Gemma:
    path, files, _ = MODELS[name]
    config = GemmaConfig.from_metadata(json.loads(path.read_text()))
    tensors = {k: v for file in files for k, v in read_prefix(file, "language_model.model.").items()}
    model: Any = fill(lambda: Gemma(config, rngs=nnx.Rngs(0)), GEMMA, tensors)
    model.layers = stack_layers(model.layers)
    return model


@pytest.fixture(scope="module")
def gemmas() -> dict[str, Gemma]:
    return {name: load(name) for name in MODELS}


@pytest.fixture(scope="module")
def gemma(gemmas) -> Gemma:
    return gemmas["release"]


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(REFERENCE)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return load_tokenizer(RELEASE, vocab_size=1024)


# Compiling is what costs here, so all tests of one model have a cache of one size.
NEW = 27


def read_one_by_one(gemma, prompt, given) -> jax.Array:
    """The logits after a prompt, padded with some token, and after each given token."""
    config = (gemma.rest if isinstance(gemma, Streamed) else gemma).config
    cache = Cache.empty(config, BUCKET + NEW, dtype=jnp.float32)
    row = jnp.asarray(np.pad(prompt, (0, BUCKET - len(prompt)), constant_values=7)[None])
    step = partial(next_logits, gemma, dtype=jnp.float32)
    logits, cache = step(row, cache, 0, len(prompt) - 1)
    found = [logits[0]]
    for position, token in enumerate(given, start=len(prompt)):
        logits, cache = step(jnp.full((1, 1), token, jnp.int32), cache, position, 0)
        found.append(logits[0])
    return jnp.stack(found)


write = partial(generate, dtype=jnp.float32, max_new_tokens=NEW, stop_ids=(), top_k=64)
greedy = partial(write, seed=0, temperature=0.0, top_p=1.0)

# ------------------------------------------------------------------ logits and tokens


@pytest.mark.parametrize("name", MODELS)
def test_logits_after_each_token_agree_with_transformers(name, gemmas, expected):
    """Short prompts that cross the sliding window while they are continued, and prompts that are longer than it."""
    for run in ("0", "1"):
        prompt, given = expected[f"{name}.{run}.in.prompt"], expected[f"{name}.{run}.in.given"]
        found = read_one_by_one(gemmas[name], prompt, given)
        theirs = expected[f"{name}.{run}.out.logits"]
        np.testing.assert_allclose(found[:, :: MODELS[name][2]], theirs, atol=TOLERANCE, rtol=0, err_msg=run)


def test_the_reference_runs_reach_past_the_sliding_window(gemmas, expected):
    for name, gemma in gemmas.items():
        lengths = [
            (len(expected[f"{name}.{run}.in.prompt"]), len(expected[f"{name}.{run}.in.given"])) for run in (0, 1)
        ]
        window = gemma.config.sliding_window
        assert lengths[0][0] < window < sum(lengths[0])
        assert lengths[1][0] > window


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_agree_with_transformers(name, gemmas, expected):
    for run in ("0", "1"):
        theirs = expected[f"{name}.{run}.out.tokens"].tolist()
        prompt = expected[f"{name}.{run}.in.prompt"].tolist()
        ours = greedy(gemmas[name], prompt)
        assert len(ours) == NEW
        assert ours[: len(theirs)] == theirs


def test_writing_ends_before_a_stop_token(gemmas, expected):
    prompt, theirs = expected["ltx.1.in.prompt"].tolist(), expected["ltx.1.out.tokens"].tolist()
    calls = []
    stop = theirs[-1]
    found = greedy(gemmas["ltx"], prompt, stop_ids=(95, stop), advance=lambda: calls.append(1))
    assert found == theirs[: theirs.index(stop)]
    assert len(calls) == len(found) > 0
    assert greedy(gemmas["ltx"], prompt, stop_ids=(theirs[0],)) == []


def test_prompts_of_other_lengths_and_other_settings_compile_nothing(gemmas, caplog):
    def compiled() -> bool:
        return any("ompil" in record.message for record in caplog.records)

    write(gemmas["ltx"], [5] * 3, seed=0, temperature=0.5, top_p=0.9)
    with jax.log_compiles():
        write(gemmas["ltx"], [6] * 200, seed=1, temperature=0.8, top_p=0.5)
        greedy(gemmas["ltx"], [6] * 512)
        assert not compiled()
        write(gemmas["ltx"], [6] * 512, seed=1, temperature=0.8, top_p=0.5, top_k=63)
        assert compiled()


@pytest.fixture(scope="module")
def packed() -> Gemma:
    """Random weights of a trained model's size, those of the layers packed in 5 bits."""
    config = GemmaConfig.from_metadata(json.loads(MODELS["ltx"][0].read_text()))
    config = replace(config, hidden_dim=44, num_layers=2, sliding_layers=(True, False), sliding_window=5)
    gemma = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(gemma):
        if isinstance(variable, nnx.Variable):
            shape = variable.get_value().shape
            scale = shape[0] ** -0.5 if len(shape) > 1 else 0.3
            variable.set_value(jnp.asarray(scale * generator.standard_normal(shape), jnp.bfloat16))
    for layer in gemma.layers:
        quantize_linears(layer, select=lambda path, linear: 5)
    gemma.layers = stack_layers(gemma.layers)
    return gemma


def test_packed_layers_write_as_the_text_encoder_reads(packed):
    """The logits are the encoder's last state, after as many tokens, times the embedding."""
    tokens = np.random.default_rng(1).integers(0, 96, 17).astype(np.int32)
    found = read_one_by_one(packed, tokens[:11], tokens[11:])
    states = jax.jit(lambda gemma: gemma(jnp.asarray(tokens[None]), jnp.ones((1, 17), bool), dtype=jnp.float32))(packed)
    theirs = states[-1, 0, 10:] @ packed.embed.embedding.get_value().astype(jnp.float32).T
    assert float(jnp.abs(theirs).max()) > 1
    np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0)


def test_streamed_layers_give_the_same_logits_and_tokens(gemmas, expected):
    gemma = gemmas["ltx"]
    graphdef, state = nnx.split(gemma.layers[0].layer)
    layers = [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(gemma.config.num_layers)]
    rest = nnx.clone(gemma)
    rest.layers = nnx.List([])
    streamed = Streamed(rest, {"layers": HostLayers(layers)})
    prompt, given = expected["ltx.0.in.prompt"], expected["ltx.0.in.given"][:3]
    ours, theirs = (read_one_by_one(model, prompt, given) for model in (streamed, gemma))
    # The layers agree bit for bit; the head is compiled alone here, and together with them there.
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    drawn = [write(model, prompt.tolist(), seed=3, temperature=0.7, top_p=0.95) for model in (streamed, gemma)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("weights", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_cache_has_the_dtype_of_the_activations_and_logits_are_float32(gemma, weights, dtype):
    model = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, weights), gemma)
    cache = jax.eval_shape(lambda: Cache.empty(gemma.config, 40, dtype=dtype))
    row = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    logits, filled = jax.eval_shape(partial(read_on, dtype=dtype), model, row, cache, 0, 31)
    assert (logits.shape, logits.dtype) == ((1, 1024), jnp.float32)
    assert filled == cache
    assert filled.keys.dtype == dtype


def test_one_token_needs_no_wider_copy_of_the_embedding():
    config = GemmaConfig.from_metadata(json.loads(MODELS["ltx"][0].read_text()))
    config = replace(config, vocab_size=2**18, hidden_dim=256, num_layers=1, sliding_layers=(True,))
    gemma = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
    gemma = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), gemma)
    cache = jax.eval_shape(lambda: Cache.empty(config, 64, dtype=jnp.bfloat16))
    token, number = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.default_matmul_precision("default"):  # as a pipeline in bfloat16
        memory = measure(find_card("rtx4090"), read_on, gemma, token, cache, number, number, dtype=jnp.bfloat16)
    embedding = config.vocab_size * config.hidden_dim * 2
    assert memory.argument_bytes > embedding
    assert memory.added_bytes < embedding / 10  # a float32 copy would be twice the embedding


# ------------------------------------------------------------------ sampling


def test_temperature_top_k_and_top_p_agree_with_transformers(expected):
    with safe_open(REFERENCE, "np") as file:
        settings = file.metadata()
    top_k, top_p, temperature = int(settings["top_k"]), float(settings["top_p"]), float(settings["temperature"])
    rows = zip(expected["sampling.in.logits"], expected["sampling.out.probabilities"], strict=True)
    for logits, theirs in rows:
        scaled, ids = candidates(jnp.asarray(logits), temperature, top_p, top_k=top_k)
        ours = np.zeros_like(theirs)
        ours[np.asarray(ids)] = jax.nn.softmax(scaled)
        assert 1 < np.count_nonzero(theirs) < top_k
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = jnp.log(jnp.asarray([0.1, 0.5, 0.02, 0.38]))
    keys = jax.random.split(jax.random.key(3), 4000)
    draw = jax.jit(lambda keys, *settings: jax.vmap(lambda key: sample(logits, key, *settings, top_k=50))(keys))
    drawn = draw(keys, 1.0, 0.95)
    # Without the last 0.02, which 0.98 stand before. Four standard deviations of a share of 4000 are at most 0.032.
    np.testing.assert_allclose(jnp.bincount(drawn, length=4) / 4000, np.array([10, 50, 0, 38]) / 98, atol=0.032)
    for temperature, top_p in ((0.0, 1.0), (1.0, 1e-6)):
        assert set(np.asarray(draw(keys, temperature, top_p))) == {1}


def test_the_same_seed_writes_the_same_and_another_seed_something_else(gemma):
    drawn = partial(write, gemma, [2, 300, 400], temperature=0.7, top_p=0.95)
    assert drawn(seed=5) == drawn(seed=5)
    assert len({tuple(drawn(seed=seed)) for seed in (5, 6, 7)}) == 3


# ------------------------------------------------------------------ chat


def test_a_chat_has_the_tokens_of_the_published_template(tokenizer, expected):
    token_ids, stop_ids = chat_tokens(tokenizer, 'Write a prompt.\n\nA heron lands; "Häh?" says the wind.')
    assert token_ids == expected["chat.out.tokens"].tolist()
    assert stop_ids == {1, 6}


def test_a_tokenizer_without_turns_is_refused():
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    plain.add_special_tokens([AddedToken("<eos>", special=True)])
    with pytest.raises(TextError, match=r"no <start_of_turn> and no <end_of_turn>.*gemma-3-12b-it"):
        chat_tokens(PromptTokenizer(tokenizer=plain, text_length=8, bos_id=0, pad_id=0, add_bos=True), "a")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A heron lands. It calls.", "A heron lands. It calls."),
        ("  A heron\nlands.\n\nIt   calls.\n", "A heron lands. It calls."),
        ("Here's the enhanced prompt:\n\nA heron lands.", "A heron lands."),
        ("Okay, here is a detailed description of your idea:\nA heron lands.", "A heron lands."),
        ("**Enhanced Prompt:** A heron lands.", "A heron lands."),
        ("## Prompt:\n> A heron lands.", "> A heron lands."),
        ('"A heron lands."', "A heron lands."),
        ("“A heron lands — it’s slow…”", "A heron lands - it's slow..."),
        # What belongs to the prompt stays.
        ('"Stop!" cries a boy. A girl says: "No."', '"Stop!" cries a boy. A girl says: "No."'),
        ("Here a woman says: it rains.", "Here a woman says: it rains."),
        ("3 dogs run: a red one leads.", "3 dogs run: a red one leads."),
        ("Élan. 東京の夜。", "Élan. 東京の夜。"),
        # Nothing left.
        ("", ""),
        (' \n"" ', ""),
        ("Here is the prompt:\n", ""),
        ("...", ""),
    ],
)
def test_answers_are_cleaned(answer, text):
    assert clean(answer) == text


# ------------------------------------------------------------------ prompts


def test_a_prompt_is_enhanced_the_same_way_for_the_same_seed(gemma, tokenizer, recwarn, monkeypatch):
    # The miniature tokenizer makes so many tokens of the instructions that they are compiled for another bucket.
    monkeypatch.setattr(enhance, "TEXT_TO_CLIP", "Write a prompt.")
    enhanced = partial(enhance_prompt, gemma, tokenizer, "a heron lands", dtype=jnp.float32, max_new_tokens=NEW)
    text = enhanced(seed=1)
    assert text
    assert text != "a heron lands"
    assert text == enhanced(seed=1)
    assert text != enhanced(seed=2)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.fixture
def asked(monkeypatch, tokenizer) -> list[str]:
    """The chats that were asked; the answer is always the same."""
    chats = []

    def answer(gemma, token_ids, **settings) -> list[int]:
        chats.append(tokenizer.tokenizer.decode(list(token_ids), skip_special_tokens=False))
        return tokenizer.tokenizer.encode("Prompt: The heron falls.").ids

    monkeypatch.setattr(enhance, "generate", answer)
    return chats


def test_instructions_stand_before_the_users_words(gemma, tokenizer, asked):
    assert enhance_prompt(gemma, tokenizer, " a heron\n", seed=1, dtype=jnp.float32) == "The heron falls."
    turn = f"<start_of_turn>user\n{enhance.TEXT_TO_CLIP}\n\na heron<end_of_turn>\n<start_of_turn>model\n"
    assert asked == [f"<bos>{turn}"]


def test_an_image_is_not_looked_at_and_that_is_said(gemma, tokenizer, asked):
    with pytest.warns(UserWarning, match="without looking at the image.*no vision tower.*what the image shows"):
        enhance_prompt(gemma, tokenizer, "a heron", seed=1, dtype=jnp.float32, with_image=True)
    assert enhance.IMAGE_TO_CLIP in asked[0]
    assert enhance.TEXT_TO_CLIP not in asked[0]


def test_where_nothing_is_written_the_users_prompt_stays(gemma, tokenizer, monkeypatch):
    monkeypatch.setattr(enhance, "generate", lambda *args, **settings: [1])
    with pytest.warns(UserWarning, match="wrote nothing for 'a heron'"):
        assert enhance_prompt(gemma, tokenizer, "a heron", seed=1, dtype=jnp.float32) == "a heron"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 .* or above, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .* or above, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"prompt": " \n"}, "no prompt to enhance; give a few words"),
    ],
)
def test_what_cannot_be_used_is_refused(gemma, tokenizer, settings, message):
    with pytest.raises(TextError, match=message):
        enhance_prompt(gemma, tokenizer, **{"prompt": "a heron", "seed": 1, "dtype": jnp.float32} | settings)


def test_a_text_encoder_with_a_head_of_its_own_is_refused(gemma, tokenizer):
    metadata = json.loads((RELEASE / "config.json").read_text())
    assert GemmaConfig.from_metadata(metadata).tied_head
    other = nnx.clone(gemma)
    for untied in (metadata | {"tie_word_embeddings": False}, metadata["text_config"] | {"tie_word_embeddings": False}):
        other.config = GemmaConfig.from_metadata(untied)
        with pytest.raises(TextError, match="tie_word_embeddings = false"):
            enhance_prompt(other, tokenizer, "a heron", seed=1, dtype=jnp.float32)


def test_a_tokenizer_of_another_model_is_refused(gemmas, tokenizer):
    with pytest.raises(TextError, match="ids up to 1023, but the text encoder only embeds ids below 96"):
        enhance_prompt(gemmas["ltx"], tokenizer, "a heron", seed=1, dtype=jnp.float32)
