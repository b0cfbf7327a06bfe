"""Prompts to contexts, in three stages: tokens, the text encoder's hidden states, the contexts of video and audio.

Each stage can be called alone, so that the text encoder, the largest model but one, is gone before the next begins:

    token_ids, mask = tokenize(tokenizer, prompts)
    hidden_states = text_hidden_states(gemma, token_ids, mask, dtype=jnp.bfloat16)
    del gemma
    contexts = text_contexts(connectors, hidden_states, mask)

`encode_prompts` does all three where both models fit in memory.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int
from tokenizers import Tokenizer

from ltx_jax.models.connector import Connector, Contexts, FeatureExtractor, TextConnectors
from ltx_jax.models.gemma import Gemma, HiddenStates
from ltx_jax.offload import Streamed
from ltx_jax.stack import Entered

TEXT_LENGTH = 1024  # tokens that LTX-2.3 was trained on; a tokenizer may set a smaller limit


class TextError(ValueError):
    """A tokenizer, text encoder or prompt that cannot be used."""


class EncodedPrompt(NamedTuple):
    """One prompt as token ids, padded on the left; `mask` is True at its tokens."""

    token_ids: Int[np.ndarray, " tokens"]
    mask: Bool[np.ndarray, " tokens"]
    dropped_text: str  # what did not fit


@dataclass(frozen=True, kw_only=True)
class PromptTokenizer:
    """Gemma's tokenizer as LTX-2.3 uses it: no chat template, begin-of-sequence in front, nothing behind."""

    tokenizer: Tokenizer
    text_length: int
    bos_id: int
    pad_id: int
    add_bos: bool

    @property
    def num_ids(self) -> int:
        """Ids this tokenizer can give: all are below this number."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, prompt: str) -> EncodedPrompt:
        """Strips, tokenizes, cuts to `text_length` from behind, pads on the left. The prompt may be empty."""
        prompt = prompt.strip()
        # The one begin-of-sequence token is ours to add, whatever the tokenizer's own template does.
        encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
        bos = [self.bos_id] if self.add_bos and encoding.ids[:1] != [self.bos_id] else []
        kept = self.text_length - len(bos)
        token_ids = np.asarray(bos + encoding.ids[:kept], np.int32)
        num_pads = self.text_length - len(token_ids)
        return EncodedPrompt(
            token_ids=np.pad(token_ids, (num_pads, 0), constant_values=self.pad_id),
            mask=np.arange(self.text_length) >= num_pads,
            dropped_text=prompt[encoding.offsets[kept][0] :] if len(encoding.ids) > kept else "",
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises TextError if this tokenizer gives ids that an embedding of `vocab_size` rows does not have."""
        num_ids = self.num_ids
        if num_ids > vocab_size:
            raise TextError(
                f"the tokenizer gives ids up to {num_ids - 1}, but the text encoder only embeds ids below "
                f"{vocab_size}; take the tokenizer from the same folder as the text encoder's weights"
            )


def load_tokenizer(folder: str | Path, *, vocab_size: int | None = None) -> PromptTokenizer:
    """Reads `tokenizer.json`, and `tokenizer_config.json` where there is one, of a Gemma 3 folder.

    `vocab_size` is that of the text encoder, to check the tokenizer against. Raises TextError if the folder holds no
    usable tokenizer, or one that does not belong to the text encoder.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TextError(
            f"no tokenizer.json in {folder}; expected the folder of Gemma 3 as published, with tokenizer.json and "
            "tokenizer_config.json beside the weights (tokenizer.model alone is not read)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TextError(f"{path} is not a tokenizer that the `tokenizers` library can read: {error}") from error
    # Some exports store a length in the file; cutting and padding happen in `encode` alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    settings = folder / "tokenizer_config.json"
    try:
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise TextError(f"{settings} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TextError(f"{settings} is not a JSON object; expected the settings of Gemma 3's tokenizer")
    limit, add_bos = config.get("model_max_length"), config.get("add_bos_token", True)
    if limit is not None and not (type(limit) in (int, float) and limit >= 1):
        raise TextError(f"{settings} has model_max_length {limit!r:.80}; expected a number of tokens")
    if type(add_bos) is not bool:
        raise TextError(f"{settings} has add_bos_token {add_bos!r:.80}; expected true or false")
    result = PromptTokenizer(
        tokenizer=tokenizer,
        text_length=TEXT_LENGTH if limit is None else int(min(TEXT_LENGTH, limit)),
        bos_id=_special_id(tokenizer, path, config.get("bos_token") or "<bos>"),
        pad_id=_special_id(tokenizer, path, config.get("pad_token") or "<pad>"),
        add_bos=add_bos,
    )
    if vocab_size is not None:
        result.check_vocabulary(vocab_size)
    return result


def _special_id(tokenizer: Tokenizer, path: Path, token: Any) -> int:
    """The id of a special token, which a configuration gives as text or as `{"content": text, ...}`."""
    text = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if found is None:
        raise TextError(
            f"{path} has no token {text!r:.80}; expected the tokenizer of Gemma 3, which has <bos> and <pad>"
        )
    return found


def tokenize(
    tokenizer: PromptTokenizer, prompts: Sequence[str]
) -> tuple[Int[Array, "prompts tokens"], Bool[Array, "prompts tokens"]]:
    """Token ids and mask, one row a prompt. Warns of each prompt that is too long, with the text that was cut off."""
    if isinstance(prompts, str) or not prompts:
        raise TextError(f"prompts must be a list with at least one text, got {prompts!r}")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, row in zip(prompts, encoded, strict=True):
        if row.dropped_text:
            warnings.warn(
                f"the prompt {prompt.strip()[:40]!r}... is longer than {tokenizer.text_length} tokens; this was cut "
                f"off: {row.dropped_text!r}",
                stacklevel=2,
            )
    return jnp.asarray(np.stack([row.token_ids for row in encoded])), jnp.asarray(
        np.stack([row.mask for row in encoded])
    )


def text_hidden_states(
    gemma: Gemma | Streamed,
    token_ids: Int[Array, "prompts tokens"],
    mask: Bool[Array, "prompts tokens"],
    *,
    dtype: DTypeLike,
) -> HiddenStates:
    """The states of all of Gemma's layers, computed in `dtype`. A row does not depend on the others."""
    if not isinstance(gemma, Streamed):
        return read_text(gemma, token_ids, mask, dtype=dtype)
    entered = enter_gemma(gemma.rest, token_ids, mask, dtype=dtype)
    x, states = gemma.layers["layers"].run(Gemma.step, entered.carry, entered.shared, entered.per_layer)
    return leave_gemma(gemma.rest, x, states, entered.rest)


def text_contexts(
    connectors: TextConnectors | Streamed, hidden_states: HiddenStates, mask: Bool[Array, "prompts tokens"]
) -> Contexts:
    """The contexts of both streams, in the dtype of the hidden states. A row does not depend on the others."""
    if not isinstance(connectors, Streamed):
        return connect(connectors, hidden_states, mask)
    contexts = []
    features = project(connectors.rest.projection, hidden_states, mask)
    for name, x in zip(("video", "audio"), features, strict=True):
        connector = getattr(connectors.rest, name)
        entered = enter_connector(connector, x, mask)
        x, outs = connectors.layers[f"{name}.blocks"].run(Connector.step, entered.carry, entered.shared, None)
        contexts.append(leave_connector(connector, x, outs, entered.rest))
    return Contexts(*contexts)


# The compiled programs, for resident models and, with `enter` and `leave`, for streamed ones.


@partial(jax.jit, static_argnames="dtype")
def read_text(gemma: Gemma, token_ids, mask, *, dtype: DTypeLike) -> HiddenStates:
    return gemma(token_ids, mask, dtype=dtype)


@jax.jit
def connect(connectors: TextConnectors, hidden_states: HiddenStates, mask) -> Contexts:
    return connectors(hidden_states, mask)


@partial(jax.jit, static_argnames="dtype")
def enter_gemma(rest: Gemma, token_ids, mask, *, dtype: DTypeLike) -> Entered:
    return rest.enter(token_ids, mask, dtype=dtype)


@jax.jit
def leave_gemma(rest: Gemma, x, states, more) -> HiddenStates:
    return rest.leave(x, states, more)


@jax.jit
def project(projection: FeatureExtractor, hidden_states: HiddenStates, mask) -> Contexts:
    return projection(hidden_states, mask)


@jax.jit
def enter_connector(rest: Connector, features, mask) -> Entered:
    return rest.enter(features, mask)


@jax.jit
def leave_connector(rest: Connector, x, outs, more):
    return rest.leave(x, outs, more)


def encode_prompts(
    gemma: Gemma | Streamed,
    connectors: TextConnectors | Streamed,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    dtype: DTypeLike,
) -> Contexts:
    """The contexts of all prompts, a row each, computed in `dtype`; hidden states of one prompt are alive at a time.

    Raises TextError if the three do not belong together.
    """
    encoder = gemma.rest if isinstance(gemma, Streamed) else gemma
    reader = connectors.rest if isinstance(connectors, Streamed) else connectors
    tokenizer.check_vocabulary(encoder.config.vocab_size)
    gives = encoder.config.num_layers + 1, encoder.config.hidden_dim
    takes = reader.config.num_hidden_states, reader.config.hidden_dim
    if gives != takes:
        raise TextError(
            f"the text encoder gives {gives[0]} hidden states of width {gives[1]}, but the connectors were made for "
            f"{takes[0]} of width {takes[1]}; use the text encoder that the checkpoint was trained with"
        )
    token_ids, mask = tokenize(tokenizer, prompts)
    rows = []
    for i in range(len(prompts)):
        row = slice(i, i + 1)
        hidden_states = text_hidden_states(gemma, token_ids[row], mask[row], dtype=dtype)
        rows.append(text_contexts(connectors, hidden_states, mask[row]))
    video, audio = zip(*rows, strict=True)
    return Contexts(jnp.concatenate(video), jnp.concatenate(audio))
