"""What is given and what is generated: images, keyframes and frozen audio placed on the tokens of a clip.

Source: `conditioning` and `noisers` in Lightricks/LTX-2, ltx_core.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LatentState:
    """One modality's tokens before noise: the generated ones first, appended conditioning behind them."""

    initial: Tokens  # what noise is mixed into: zeros, or the latents of an earlier stage
    clean: Tokens  # what tokens with a mask below 1 are held to
    mask: Float[Array, "1 tokens"] | None  # 1 generate, 0 keep; None: all 1
    positions: Positions
    num_generated: int = field(metadata={"static": True})  # tokens of the clip itself; those behind are appended
    # Nothing is generated: the model sees this modality at sigma 0.
    frozen: bool = field(default=False, metadata={"static": True})

    def noised(self, noise: Tokens, noise_scale: float = 1.0) -> Tokens:
        """The tokens that denoising starts from: `noise_scale` of noise, less where the mask says so."""
        noisy = self.initial + noise_scale * (noise - self.initial)
        if self.mask is None:
            return noisy
        return self.clean + self.mask[..., None].astype(noisy.dtype) * (noisy - self.clean)

    def hold(self, denoised: Tokens) -> Tokens:
        """Puts the clean tokens back into a denoised estimate, as far as the mask says."""
        if self.mask is None:
            return denoised
        mask = self.mask[..., None].astype(jnp.float32)
        held = denoised.astype(jnp.float32) * mask + self.clean.astype(jnp.float32) * (1 - mask)
        return held.astype(denoised.dtype)

    def timesteps(self, sigma) -> Float[Array, "1 #tokens"]:
        """The noise level of each token; one column where all share it."""
        return jnp.full((1, 1), sigma, jnp.float32) if self.mask is None else self.mask * sigma

    @property
    def explicit_mask(self) -> Float[Array, "1 tokens"]:
        return jnp.ones(self.initial.shape[:2], jnp.float32)[:1] if self.mask is None else self.mask


def _state(tokens: Tokens, clean: Tokens, positions: Positions) -> LatentState:
    return LatentState(initial=tokens, clean=clean, mask=None, positions=positions, num_generated=tokens.shape[1])


def video_state(grid: VideoGrid, *, channels: int, dtype, latents: VideoLatents | None = None) -> LatentState:
    """A clip to be generated, from nothing or from the latents of an earlier stage."""
    shape = grid.latent_frames, grid.latent_height, grid.latent_width
    tokens = jnp.zeros((1, grid.num_tokens, channels), dtype) if latents is None else patchify_video(latents)
    return _state(tokens.astype(dtype), tokens.astype(dtype), video_positions(shape, fps=grid.fps, scale=grid.scale))


def audio_state(length: int, config: AudioVAEConfig, *, dtype, latents: AudioLatents | None = None) -> LatentState:
    """Sound to be generated, from nothing or from the latents of an earlier stage."""
    tokens = jnp.zeros((1, length, config.token_dim), dtype) if latents is None else patchify_audio(latents)
    return _state(tokens.astype(dtype), tokens.astype(dtype), audio_positions(length, config))


def frozen(state: LatentState) -> LatentState:
    """The same latents kept as they are, for the other modality to follow."""
    return replace(state, mask=jnp.zeros(state.initial.shape[:2], jnp.float32)[:1], frozen=True)


def replace_frame(
    state: LatentState, latents: VideoLatents, *, grid: VideoGrid, latent_frame: int = 0, strength: float = 1.0
) -> LatentState:
    """Puts an image's latents in place of one latent frame; `strength` 1 keeps it exactly, 0 ignores it."""
    tokens = patchify_video(latents).astype(state.initial.dtype)
    start = latent_frame * grid.latent_height * grid.latent_width
    where = slice(start, start + tokens.shape[1])
    return replace(
        state,
        initial=state.initial.at[:, where].set(tokens),
        clean=state.clean.at[:, where].set(tokens),
        mask=state.explicit_mask.at[:, where].set(1 - strength),
    )


def append_keyframe(
    state: LatentState, latents: VideoLatents, *, grid: VideoGrid, frame: int, strength: float = 1.0
) -> LatentState:
    """Appends an image's tokens, placed at pixel frame `frame`, for the generated tokens to attend to."""
    tokens = patchify_video(latents).astype(state.initial.dtype)
    positions = keyframe_positions((grid.latent_height, grid.latent_width), frame=frame, fps=grid.fps, scale=grid.scale)
    kept = jnp.full((1, tokens.shape[1]), 1 - strength, jnp.float32)
    return replace(
        state,
        initial=jnp.concatenate([state.initial, jnp.zeros_like(tokens)], axis=1),
        clean=jnp.concatenate([state.clean, tokens], axis=1),
        mask=jnp.concatenate([state.explicit_mask, kept], axis=1),
        positions=jnp.concatenate([state.positions, positions], axis=1),
    )
