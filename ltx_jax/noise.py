"""The noise that denoising starts from: drawn from a seed, or given in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from ltx_jax.conditioning import LatentState
from ltx_jax.denoise import Pair
from ltx_jax.sampling import normalised_noise


def read_noise(path: Path) -> dict[str, Array]:
    """The arrays of a noise file. Raises ValueError if it cannot be read."""
    try:
        with safe_open(path, "flax") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith("in.")}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the noise file {path} cannot be read as safetensors: {error}") from error


class Noise:
    """The noise of one stage: from a seed, video first and then audio, or given.

    Stages, and the windows of a clip that is extended, have noise of their own: each is the same with those before it
    or alone.
    """

    def __init__(self, seed: int, given: Mapping[str, Any] | None, dtype: Any, *, stage: int = 1, window: int = 0):
        self.key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), window), stage)
        self.given = given
        self.dtype = dtype

    def fresh(self, tokens: Pair) -> Pair:
        """More noise, of the same shape, for samplers that add some at every step."""
        self.key, *keys = jax.random.split(self.key, 3)
        return Pair(
            *(
                None if x is None else normalised_noise(jax.random.normal(key, x.shape, jnp.float32))
                for x, key in zip(tokens, keys, strict=True)
            )
        )

    def draw(self, states: tuple[LatentState | None, LatentState | None], prefix: str) -> Pair:
        """What denoising starts from. Raises ValueError where what was given does not fit."""
        self.key, *keys = jax.random.split(self.key, 3)
        return Pair(
            *(
                None
                if state is None
                else self._given(f"in.{prefix}{name}_noise", state, key)
                if self.given is not None
                else jax.random.normal(key, state.initial.shape, jnp.float32).astype(self.dtype)
                for name, state, key in zip(("video", "audio"), states, keys, strict=True)
            )
        )

    def _given(self, name: str, state: LatentState, key: Array) -> Array:
        assert self.given is not None
        if name not in self.given:
            raise ValueError(f"the noise has no {name}; it has {', '.join(sorted(self.given)) or 'nothing'}")
        noise = jnp.asarray(self.given[name])
        expected = state.initial.shape
        if noise.ndim != 3 or noise.shape[0] != 1 or noise.shape[2] != expected[2] or noise.shape[1] > expected[1]:
            raise ValueError(f"{name} has shape {list(noise.shape)}; these settings need {list(expected)}")
        appended = expected[1] - noise.shape[1]
        if appended and appended != expected[1] - state.num_generated:
            raise ValueError(f"{name} has shape {list(noise.shape)}; these settings need {list(expected)}")
        # Noise for appended images may be left out: whatever of it remains is drawn from the seed.
        extra = jax.random.normal(key, (1, appended, expected[2]), jnp.float32)
        return jnp.concatenate([noise.astype(jnp.float32), extra], axis=1).astype(self.dtype)
