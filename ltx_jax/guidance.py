"""Guidance: classifier-free, spatio-temporal (STG) and modality guidance on the denoised estimate, with rescaling.

Source: `guiders.py` in Lightricks/LTX-2, ltx_core/components; CFG https://arxiv.org/abs/2207.12598, STG
https://arxiv.org/abs/2411.18664, rescaling https://arxiv.org/abs/2305.08891.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ltx_jax.models.transformer import Keep

Tokens = Float[Array, "batch tokens channels"]
Scale = Float[Array, ""] | float


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


class Scales(NamedTuple):
    """The scales of a `Guidance` as traced numbers, so that another scale needs no other program."""

    cfg: Scale
    stg: Scale
    modality: Scale
    rescale: Scale

    @classmethod
    def of(cls, guidance: Guidance) -> "Scales":
        values = guidance.cfg_scale, guidance.stg_scale, guidance.modality_scale, guidance.rescale
        return cls(*(jnp.asarray(value, jnp.float32) for value in values))


# The denoised estimates of one modality, by the name of the pass, and the scales: to the guided estimate, in float32.
# "conditional" is always there; "unconditional" (the negative context), "perturbed" (STG) and "isolated" (without the
# other modality) where their scales are on.
Guider = Callable[[Mapping[str, Tokens], Scales], Tokens]


def guide(estimates: Mapping[str, Tokens], scales: Scales) -> Float[Array, "batch tokens channels"]:
    """LTX-2.3's guider: away from each of the other estimates, in float32.

    `rescale` pulls the deviation of the whole tensor (appended tokens too) back towards that of the conditional.
    """
    c = estimates["conditional"].astype(jnp.float32)
    guided = c
    if "unconditional" in estimates:
        guided += (scales.cfg - 1) * (c - estimates["unconditional"].astype(jnp.float32))
    if "perturbed" in estimates:
        guided += scales.stg * (c - estimates["perturbed"].astype(jnp.float32))
    if "isolated" in estimates:
        guided += (scales.modality - 1) * (c - estimates["isolated"].astype(jnp.float32))
    # The deviations are computed anyway, so that a traced scale needs no second program.
    factor = jnp.std(c, ddof=1) / jnp.maximum(jnp.std(guided, ddof=1), jnp.finfo(jnp.float32).tiny)
    return guided * (scales.rescale * factor + (1 - scales.rescale))


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
