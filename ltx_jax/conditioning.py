"""What is given and what is generated: images, keyframes and frozen audio placed on the tokens of a clip.

Source: `conditioning` and `noisers` in Lightricks/LTX-2, ltx_core.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ltx_jax.abstract import tree_dataclass
from ltx_jax.config import AudioVAEConfig
from ltx_jax.geometry import (
    AudioLatents,
    Positions,
    Tokens,
    VideoGrid,
    VideoLatents,
    audio_positions,
    keyframe_positions,
    patchify_audio,
    patchify_video,
    video_positions,
)


@tree_dataclass
@dataclass(frozen=True, kw_only=True)
class LatentState:
    """One modality's tokens before noise: the generated ones first, appended conditioning behind them."""

    initial: Tokens  # what noise is mixed into: zeros, or the latents of an earlier stage
    clean: Tokens  # what tokens with a mask below 1 are held to
    # The share of noise that a token takes, 1 generated, 0 kept: the distinct shares, and which of them each token has.
    shares: Float[Array, " levels"]
    level: Int[Array, " tokens"] | None  # None: all tokens have the first
    positions: Positions
    num_generated: int = field(metadata={"static": True})  # tokens of the clip itself; those behind are appended
    # Nothing is generated: the model sees this modality at sigma 0.
    frozen: bool = field(default=False, metadata={"static": True})
    # Where not all tokens attend to all: the group of each, 0 the clip's own, and how far groups attend to each other.
    group: Int[Array, " tokens"] | None = None
    affinity: Float[Array, "groups groups"] | None = None

    def noised(self, noise: Tokens, noise_scale: float = 1.0) -> Tokens:
        """The tokens that denoising starts from: `noise_scale` of noise, less where the mask says so."""
        noisy = self.initial + noise_scale * (noise - self.initial)
        if self.mask is None:
            return noisy
        return self.clean + self.mask[..., None].astype(noisy.dtype) * (noisy - self.clean)

    def kept(self, tokens: Tokens) -> Tokens:
        """Noisy tokens with those that take no noise as they were given: samplers that add noise add it to all."""
        if self.level is None:
            return tokens
        return jnp.where((self.shares == 0)[self.level][:, None], self.clean, tokens)

    def hold(self, denoised: Tokens) -> Tokens:
        """Puts the clean tokens back into a denoised estimate, as far as the mask says."""
        if self.mask is None:
            return denoised
        mask = self.mask[..., None].astype(jnp.float32)
        held = denoised.astype(jnp.float32) * mask + self.clean.astype(jnp.float32) * (1 - mask)
        return held.astype(denoised.dtype)

    @property
    def mask(self) -> Float[Array, "1 tokens"] | None:
        """The share of noise of each token; None where all are generated."""
        return None if self.level is None else self.shares[self.level][None]

    def timesteps(self, sigma) -> Float[Array, "1 levels"]:
        """The distinct noise levels; `level` says which of them each token has."""
        return (self.shares * sigma)[None]

    def token_timesteps(self, sigma) -> Float[Array, "1 #tokens"]:
        """The noise level of each token; one column where all share it."""
        return self.timesteps(sigma) if self.mask is None else self.mask * sigma

    def shares_with(self, start: int, stop: int, share: float) -> dict[str, Array]:
        """`shares` and `level` with another share for tokens from `start` to `stop`; these may be appended ones."""
        mask = np.ones(max(self.initial.shape[1], stop), np.float32)
        if self.level is not None:
            mask[: len(self.level)] = np.asarray(self.shares)[np.asarray(self.level)]
        mask[start:stop] = share
        shares, level = np.unique(mask, return_inverse=True)
        return {"shares": jnp.asarray(shares), "level": jnp.asarray(level, jnp.int32)}


def _state(tokens: Tokens, clean: Tokens, positions: Positions) -> LatentState:
    return LatentState(
        initial=tokens,
        clean=clean,
        shares=jnp.ones(1),
        level=None,
        positions=positions,
        num_generated=tokens.shape[1],
    )


def video_state(grid: VideoGrid, *, channels: int, dtype, latents: VideoLatents | None = None) -> LatentState:
    """A clip to be generated, from nothing or from the latents of an earlier stage."""
    shape = grid.latent_frames, grid.latent_height, grid.latent_width
    tokens = jnp.zeros((1, grid.num_tokens, channels), dtype) if latents is None else patchify_video(latents)
    return _state(tokens.astype(dtype), tokens.astype(dtype), video_positions(shape, fps=grid.fps, scale=grid.scale))


def audio_state(length: int, config: AudioVAEConfig, *, dtype, latents: AudioLatents | None = None) -> LatentState:
    """Sound to be generated, from nothing or from the latents of an earlier stage."""
    tokens = jnp.zeros((1, length, config.token_dim), dtype) if latents is None else patchify_audio(latents)
    return _state(tokens.astype(dtype), tokens.astype(dtype), audio_positions(length, config))


def given(state: LatentState, latents: VideoLatents | AudioLatents) -> LatentState:
    """The clip's own tokens as they are given: what is kept of them is kept as it is.

    Raises ValueError for latents of another size.
    """
    patchify = patchify_video if latents.ndim == 5 else patchify_audio
    tokens = patchify(latents).astype(state.initial.dtype)
    if tokens.shape[1:] != (state.num_generated, state.initial.shape[2]):
        raise ValueError(
            f"the given latents make {tokens.shape[1]} tokens of {tokens.shape[2]}; the clip has "
            f"{state.num_generated} of {state.initial.shape[2]}"
        )
    count = state.num_generated
    return replace(state, initial=state.initial.at[:, :count].set(tokens), clean=state.clean.at[:, :count].set(tokens))


def frozen(state: LatentState) -> LatentState:
    """The same latents kept as they are, for the other modality to follow."""
    return replace(state, **state.shares_with(0, state.initial.shape[1], 0.0), frozen=True)


def replace_frame(
    state: LatentState, latents: VideoLatents, *, grid: VideoGrid, latent_frame: int = 0, strength: float = 1.0
) -> LatentState:
    """Puts an image's latents in place of one latent frame; `strength` 1 keeps it exactly, 0 ignores it."""
    tokens = patchify_video(latents).astype(state.initial.dtype)
    start = latent_frame * grid.latent_height * grid.latent_width
    stop = start + tokens.shape[1]
    return replace(
        state,
        **state.shares_with(start, stop, 1 - strength),
        initial=state.initial.at[:, start:stop].set(tokens),
        clean=state.clean.at[:, start:stop].set(tokens),
    )


def append_keyframe(
    state: LatentState, latents: VideoLatents, *, grid: VideoGrid, frame: int, strength: float = 1.0
) -> LatentState:
    """Appends an image's tokens, placed at pixel frame `frame`, for the generated tokens to attend to."""
    positions = keyframe_positions((grid.latent_height, grid.latent_width), frame=frame, fps=grid.fps, scale=grid.scale)
    return append(state, patchify_video(latents), positions, strength=strength)


def append_reference(
    state: LatentState,
    latents: VideoLatents,
    *,
    grid: VideoGrid,
    downscale: int = 1,
    time_stretch: int = 1,
    strength: float = 1.0,
    attention: float = 1.0,
) -> LatentState:
    """Appends the tokens of a reference video, as an IC-LoRA reads it: its own positions, laid over those of the clip.

    `downscale` and `time_stretch` are how much smaller and shorter it is than the clip. `attention` below 1 weakens
    the attention between the clip and the reference.
    """
    shape = latents.shape[1], latents.shape[2], latents.shape[3]
    positions = video_positions(
        shape, fps=grid.fps, scale=grid.scale, downscale=float(downscale), time_stretch=float(time_stretch)
    )
    return append(state, patchify_video(latents), positions, strength=strength, attention=attention)


def append(
    state: LatentState, tokens: Tokens, positions: Positions, *, strength: float = 1.0, attention: float = 1.0
) -> LatentState:
    """Appends tokens that are given: behind the clip's own, from which they are cut off again in the end."""
    tokens = tokens.astype(state.initial.dtype)
    start, count = state.initial.shape[1], tokens.shape[1]
    return replace(
        state,
        **state.shares_with(start, start + count, 1 - strength),
        **_grouped(state, count, attention),
        initial=jnp.concatenate([state.initial, jnp.zeros_like(tokens)], axis=1),
        clean=jnp.concatenate([state.clean, tokens], axis=1),
        positions=jnp.concatenate([state.positions, positions], axis=1),
    )


def _grouped(state: LatentState, count: int, attention: float) -> dict[str, Array]:
    """`group` and `affinity` with one more group of tokens: it attends to the clip so far, to itself, to no other."""
    if state.group is None and attention == 1:
        return {}
    if state.group is None or state.affinity is None:
        appended = np.arange(state.initial.shape[1]) >= state.num_generated  # they attend to all so far
        group, affinity = appended.astype(np.int32), np.ones((1 + appended.any(),) * 2, np.float32)
    else:
        group, affinity = np.asarray(state.group), np.asarray(state.affinity)
    new = len(affinity)
    affinity = np.pad(affinity, (0, 1))
    affinity[new, new] = 1
    affinity[new, 0] = affinity[0, new] = attention
    group = np.concatenate([group, np.full(count, new, np.int32)])
    return {"group": jnp.asarray(group), "affinity": jnp.asarray(affinity)}


def retake_window(state: LatentState, start: float, stop: float) -> LatentState:
    """The given latents kept but for the tokens whose time meets [start, stop) seconds: these are generated anew.

    Raises ValueError where no token does.
    """
    begin, end = np.asarray(state.positions[0, : state.num_generated, 0]).T
    meets = (begin < stop) & (end > start)
    if not meets.any():
        raise ValueError(
            f"the window from {start:g} to {stop:g} s lies outside of the clip, which lasts {end.max():g} s"
        )
    shares, level = np.unique(meets.astype(np.float32), return_inverse=True)
    return replace(state, shares=jnp.asarray(shares), level=jnp.asarray(level, jnp.int32))
