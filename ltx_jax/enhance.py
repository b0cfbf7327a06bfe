"""A short idea to a full prompt, written by the text encoder itself, which is a language model that follows orders.

    text = enhance_prompt(gemma, tokenizer, "a heron lands", seed=7, dtype=jnp.bfloat16)

Tokens are read and written by two compiled programs, one for all prompts of up to `BUCKET` tokens (or twice as many,
and so on), one for all tokens that follow. The same seed gives the same text, on one machine and version.
"""

import re
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ltx_jax.models.gemma import Cache, Gemma
from ltx_jax.offload import Streamed
from ltx_jax.stack import Entered
from ltx_jax.text import PromptTokenizer, TextError

MAX_NEW_TOKENS = 512
BUCKET = 512  # prompts are padded to multiples of so many tokens
KEY = 0x656E68  # keeps the seed's text apart from the seed's noise

_RULES = """\
Write one paragraph of plain English prose in the present tense, 80 to 200 words long.

- Keep all that the user says: who and what, place, style, mood, camera, sounds. Contradict nothing and leave nothing \
out. Words that are spoken stay exactly as given, in quotation marks and in their own language.
- Tell what happens in the order in which it happens, from the first moment to the last, and no more than fits into a \
few seconds. It is one continuous shot unless the user asks for cuts.
- Be concrete. Name movements, gestures, expressions and textures that can be seen; show a feeling by what it does to \
a face, a voice or a body, and do not name it.
- Say how the camera frames the scene and how it moves, and describe the light and the colors.
- Describe the sound together with what makes it: voices and their tone, footsteps, objects, weather, the room. Add \
speech or music only where the idea calls for it.
- Where the user leaves something open, choose what is most natural for the scene, and keep it simple.

Answer with the paragraph alone: no title, no introduction, no list, no comment, no quotation marks around it."""

TEXT_TO_CLIP = f"""\
You write prompts for a model that makes a short video clip together with its sound. The user gives you an idea; you \
turn it into a full prompt. Begin with the scene and whoever or whatever is in it: looks, clothes, age, place, time \
of day.

{_RULES}"""

IMAGE_TO_CLIP = f"""\
You write prompts for a model that makes a short video clip together with its sound, beginning with an image that the \
user has chosen. You cannot see the image. The user gives you an idea of what should happen; you turn it into a full \
prompt. The image already shows how everything looks: describe looks only as far as the user does, refer to people \
and things by the user's own words, and spend your words on what moves, changes and is heard from this image on.

{_RULES}"""


def enhance_prompt(
    gemma: Gemma | Streamed,
    tokenizer: PromptTokenizer,
    prompt: str,
    *,
    seed: int,
    dtype: DTypeLike,
    with_image: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.7,
    top_k: int = 64,
    top_p: float = 0.95,
    advance: Callable[[], None] = lambda: None,
) -> str:
    """A prompt of one paragraph that says what `prompt` says and more, computed in `dtype`.

    `with_image` is for a clip that begins with an image. The image itself is not looked at, as the text encoder of a
    converted checkpoint is without its vision tower; a warning says so. `advance` is called after each new token, of
    which there are `max_new_tokens` at most. The other settings are those of `sample`.

    Warns and returns `prompt` if nothing useful was written. Raises TextError for an empty prompt, settings out of
    range, and a tokenizer or text encoder that cannot be used for this.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    if not prompt.strip():
        raise TextError("there is no prompt to enhance; give a few words that say what the clip shows")
    config = (gemma.rest if isinstance(gemma, Streamed) else gemma).config
    if not config.tied_head:
        raise TextError(
            "this text encoder can read prompts but not write them: its config.json says tie_word_embeddings = false, "
            "and a head of its own is not read; expected Gemma 3 as published, whose head is its embedding"
        )
    tokenizer.check_vocabulary(config.vocab_size)
    if with_image:
        warnings.warn(
            "the prompt is enhanced without looking at the image: the text encoder of a converted checkpoint has no "
            "vision tower; say in the prompt what the image shows",
            stacklevel=2,
        )
    token_ids, stop_ids = chat_tokens(tokenizer, f"{IMAGE_TO_CLIP if with_image else TEXT_TO_CLIP}\n\n{prompt.strip()}")
    written = generate(
        gemma,
        token_ids,
        stop_ids=stop_ids,
        seed=seed,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        advance=advance,
    )
    text = clean(tokenizer.tokenizer.decode(written, skip_special_tokens=True))
    if not text:
        warnings.warn(
            f"the text encoder wrote nothing for {prompt.strip()[:40]!r}; it is used as it is. Another seed may help",
            stacklevel=2,
        )
        return prompt
    return text


def _check_settings(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    for name, value, needed, fits in (
        ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
        ("temperature", temperature, "0 (always the likeliest token) or above", 0 <= temperature < float("inf")),
        ("top_k", top_k, "at least 1", top_k >= 1),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
    ):
        if not fits:
            raise TextError(f"{name} must be {needed}, got {value}")


# ------------------------------------------------------------------ chat


def chat_tokens(tokenizer: PromptTokenizer, text: str) -> tuple[list[int], frozenset[int]]:
    """The tokens of a chat whose one turn so far is `text`, up to where the answer begins; and those that end it.

    Raises TextError if the tokenizer lacks the tokens of a chat. Source: the chat template of Gemma 3, which has no
    turn of its own for instructions: they stand before the user's words.
    """
    names = "<start_of_turn>", "<end_of_turn>", "<eos>"
    found = [tokenizer.tokenizer.token_to_id(name) for name in names]
    missing = [name for name, token in zip(names, found, strict=True) if token is None]
    if missing:
        raise TextError(
            f"the tokenizer has no {' and no '.join(missing)}, so the text encoder cannot be asked for a prompt; "
            "expected the tokenizer of an instruction-tuned Gemma 3 (gemma-3-12b-it)"
        )
    start, end, eos = (token for token in found if token is not None)

    def plain(part: str) -> list[int]:
        return tokenizer.tokenizer.encode(part, add_special_tokens=False).ids

    turn = [start, *plain(f"user\n{text}"), end, *plain("\n"), start, *plain("model\n")]
    return [tokenizer.bos_id, *turn], frozenset((end, eos))


_TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "*": None})
_PREFACE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|here)\b[^:\n]*\b(?:prompt|paragraph|description|version)\b[^:\n]*"
    r"|(?:\w+ ){0,2}prompt):",
    re.IGNORECASE,
)


def clean(answer: str) -> str:
    """An answer without what does not belong into a prompt; empty if nothing is left.

    Curly quotes and long dashes become plain, a preface ("Here is the enhanced prompt:"), signs of Markdown and quotes
    around the whole go, and lines become one paragraph.
    """
    text = answer.translate(_TO_ASCII).strip().lstrip("#>- \n")
    preface = _PREFACE.match(text)
    text = " ".join(text[preface.end() if preface else 0 :].split())
    if text[:1] == text[-1:] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text if any(character.isalnum() for character in text) else ""


# ------------------------------------------------------------------ tokens


def generate(
    gemma: Gemma | Streamed,
    token_ids: Sequence[int],
    *,
    stop_ids: Collection[int],
    seed: int,
    dtype: DTypeLike,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    advance: Callable[[], None] = lambda: None,
) -> list[int]:
    """The tokens that follow, up to one of `stop_ids`, which is left out, or `max_new_tokens`."""
    length = len(token_ids)
    padded = -(-length // BUCKET) * BUCKET
    config = (gemma.rest if isinstance(gemma, Streamed) else gemma).config
    cache = Cache.empty(config, padded + max_new_tokens, dtype=dtype)
    row = jnp.asarray(np.pad(np.asarray(token_ids, np.int32), (0, padded - length))[None])
    logits, cache = next_logits(gemma, row, cache, 0, length - 1, dtype=dtype)
    key = jax.random.fold_in(jax.random.key(seed), KEY)
    written: list[int] = []
    while True:
        position = length + len(written)
        token = int(sample(logits[0], jax.random.fold_in(key, position), temperature, top_p, top_k=top_k))
        if token in stop_ids:
            return written
        written.append(token)
        advance()
        if len(written) == max_new_tokens:
            return written
        logits, cache = next_logits(gemma, jnp.full((1, 1), token, jnp.int32), cache, position, 0, dtype=dtype)


def next_logits(
    gemma: Gemma | Streamed,
    token_ids: Int[Array, "1 tokens"],
    cache: Cache,
    start: int,
    last: int,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "1 vocab"], Cache]:
    """`Gemma.read_on`, for a resident or a streamed model. The cache given is used up."""
    if not isinstance(gemma, Streamed):
        return read_on(gemma, token_ids, cache, start, last, dtype=dtype)
    entered = enter_on(gemma.rest, token_ids, start, num_slots=cache.keys.shape[2], dtype=dtype)
    per_layer = entered.per_layer, cache
    x, new = gemma.layers["layers"].run(Gemma.step_on, entered.carry, entered.shared, per_layer)
    return leave_on(gemma.rest, x, new, cache, start, last)


@partial(jax.jit, static_argnames="dtype", donate_argnames="cache")
def read_on(gemma: Gemma, token_ids, cache: Cache, start, last, *, dtype: DTypeLike):
    return gemma.read_on(token_ids, cache, start, last, dtype=dtype)


@partial(jax.jit, static_argnames=("num_slots", "dtype"))
def enter_on(rest: Gemma, token_ids, start, *, num_slots: int, dtype: DTypeLike) -> Entered:
    return rest.enter_on(token_ids, start, num_slots=num_slots, dtype=dtype)


@partial(jax.jit, donate_argnames="cache")
def leave_on(rest: Gemma, x, new, cache: Cache, start, last):
    return rest.leave_on(x, new, cache, start, last)


@partial(jax.jit, static_argnames="top_k")
def sample(logits: Float[Array, " vocab"], key: Key[Array, ""], temperature, top_p, *, top_k: int) -> Int[Array, ""]:
    """One token, drawn from `candidates`."""
    scaled, token_ids = candidates(logits, temperature, top_p, top_k=top_k)
    return token_ids[jax.random.categorical(key, scaled)]


def candidates(
    logits: Float[Array, " vocab"], temperature, top_p, *, top_k: int
) -> tuple[Float[Array, " candidates"], Int[Array, " candidates"]]:
    """The `top_k` likeliest tokens, best first: logits divided by `temperature`, and token ids.

    Of these, those have a logit of minus infinity before which others already make up `top_p` of the probability; at a
    temperature of 0, all but the first. Source: Holtzman et al., https://arxiv.org/abs/1904.09751, for top-p.
    """
    best, token_ids = jax.lax.top_k(logits, min(top_k, logits.shape[0]))
    scaled = best / jnp.where(temperature > 0, temperature, 1.0)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    allowed = (before < top_p) & ((temperature > 0) | (jnp.arange(len(best)) == 0))
    return jnp.where(allowed, scaled, -jnp.inf), token_ids
