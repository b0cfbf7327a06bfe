"""Guidance: classifier-free, spatio-temporal (STG) and modality guidance on the denoised estimate, with rescaling.

Source: `guiders.py` in Lightricks/LTX-2, ltx_core/components; CFG https://arxiv.org/abs/2207.12598, STG
https://arxiv.org/abs/2411.18664, rescaling https://arxiv.org/abs/2305.08891.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ltx_jax.models.transformer import Keep

Tokens = Float[Array, "batch tokens channels"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How one modality is guided. The defaults guide nothing."""

    cfg_scale: float = 1.0  # 1: off
    stg_scale: float = 0.0  # 0: off
    modality_scale: float = 1.0  # 1: off
    rescale: float = 0.0  # 0: off
    stg_blocks: tuple[int, ...] = ()  # blocks whose self-attention the perturbed pass skips
    skip_step: int = 0  # guide at every (skip_step + 1)-th step and reuse the last result between

    def runs(self, step: int) -> bool:
        return step % (self.skip_step + 1) == 0

    @property
    def passes(self) -> tuple[str, ...]:
        """The model passes needed besides the conditional one."""
        wanted = {
            "unconditional": self.cfg_scale != 1,
            "perturbed": self.stg_scale != 0,
            "isolated": self.modality_scale != 1,
        }
        return tuple(name for name, needed in wanted.items() if needed)


def guide(
    conditional: Tokens,
    unconditional: Tokens | None,
    perturbed: Tokens | None,
    isolated: Tokens | None,
    *,
    cfg_scale: Float[Array, ""] | float,
    stg_scale: Float[Array, ""] | float,
    modality_scale: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float,
) -> Float[Array, "batch tokens channels"]:
    """Combines denoised estimates, float32: with the negative context, STG-perturbed, without the other modality.

    `rescale` pulls the deviation of the whole tensor (appended tokens too) back towards that of the conditional.
    """
    c = conditional.astype(jnp.float32)
    guided = c
    if unconditional is not None:
        guided += (cfg_scale - 1) * (c - unconditional.astype(jnp.float32))
    if perturbed is not None:
        guided += stg_scale * (c - perturbed.astype(jnp.float32))
    if isolated is not None:
        guided += (modality_scale - 1) * (c - isolated.astype(jnp.float32))
    # The deviations are computed anyway, so that a traced scale needs no second program.
    factor = jnp.std(c, ddof=1) / jnp.maximum(jnp.std(guided, ddof=1), jnp.finfo(jnp.float32).tiny)
    return guided * (rescale * factor + (1 - rescale))


def keep_masks(passes: tuple[str, ...], video: Guidance, audio: Guidance, num_layers: int) -> Keep | None:
    """What each row of a batched call `(conditional, *passes)` keeps, per layer; None if nothing is perturbed."""
    if not {"perturbed", "isolated"} & set(passes):
        return None
    video_self, audio_self, cross = (np.ones((num_layers, 1 + len(passes)), np.float32) for _ in range(3))
    if "perturbed" in passes:
        row = 1 + passes.index("perturbed")
        for keep, guidance in ((video_self, video), (audio_self, audio)):
            for block in guidance.stg_blocks if guidance.stg_scale != 0 else ():
                if not 0 <= block < num_layers:
                    raise ValueError(
                        f"stg_blocks names block {block}; the transformer has blocks 0 to {num_layers - 1}"
                    )
                keep[block, row] = 0
    if "isolated" in passes:
        cross[:, 1 + passes.index("isolated")] = 0
    video_keep, audio_keep, cross_keep = (jnp.asarray(keep) for keep in (video_self, audio_self, cross))
    return Keep(video_keep, audio_keep, cross_keep, cross_keep)
