"""Which models are on the device, and how: they take turns, whole or with their layers streamed.

A plan decides before anything is read; when memory runs out all the same, `retreat` takes the next smaller way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ltx_jax.checkpoint import LAYERED, Manifest
from ltx_jax.load import load_component
from ltx_jax.lora import Lora, add_loras, set_strengths
from ltx_jax.models.attention import AttentionForm, set_attention_form
from ltx_jax.offload import Streamed
from ltx_jax.plan import TILES, Plan
from ltx_jax.tiling import TileSize


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a clip is made on a device. The default suits a device with room for everything."""

    offload: tuple[str, ...] = ()  # models whose layers are streamed
    attention: AttentionForm = "chunked"
    tile: TileSize = TILES[0]
    keep_models: bool = True  # otherwise each stage frees the models of the one before
    keep_transformer: bool = True  # while latents are upscaled between two denoising stages

    @classmethod
    def of(cls, plan: Plan) -> "Way":
        upscaling = [stage for stage in plan.stages if stage.name == "upscale"]
        return cls(
            offload=plan.offload,
            attention=plan.attention,
            tile=plan.tile,
            keep_models=plan.keep_models,
            keep_transformer=not plan.offload and all(stage.held_bytes for stage in upscaling),
        )

    def smaller(self) -> "Way | None":
        """The next way that needs less memory, or None if this is the last."""
        last = replace(self, offload=LAYERED, attention=self.attention, keep_models=False, keep_transformer=False)
        if self.tile in TILES[:-1]:
            last = replace(last, tile=TILES[TILES.index(self.tile) + 1])
        return None if last == self else last


class Residency:
    """The models of one checkpoint folder, loaded when first asked for."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        dtype: Any,
        loras: Sequence[Lora],
        loading: Callable[[str], Any],
    ):
        """`loading(component)` is a context that is open while a model is read."""
        self.folder = folder
        self.manifest = manifest
        self.dtype = dtype
        self.loras = tuple(loras)
        self.loading = loading
        self.way = Way()
        self.loaded: dict[str, nnx.Module | Streamed] = {}
        self.stage_number = 1  # of the stage at work: LoRAs may act otherwise in the second
        self._strengths: list[float] = []  # that the transformer was loaded with, or given since

    @property
    def strengths(self) -> list[float]:
        """Of the LoRAs, in the stage at work."""
        return [lora.in_stage(self.stage_number) for lora in self.loras]

    def get(self, component: str) -> Any:
        """A model, loaded on first use; a `Streamed` one where the way says so."""
        if component == "transformer" and component in self.loaded and self._strengths != self.strengths:
            self._set_strengths(self.loaded[component])
        if component not in self.loaded:
            with self.loading(component):
                self.loaded[component] = self._load(component)
        return self.loaded[component]

    def _set_strengths(self, transformer: nnx.Module | Streamed) -> None:
        if isinstance(transformer, Streamed):  # its layers lie packed in host memory: they are packed anew
            self.free("transformer")
        else:
            set_strengths(transformer, self.strengths)
            self._strengths = self.strengths

    def _load(self, component: str) -> nnx.Module | Streamed:
        # Plain weights follow the compute dtype, as in the reference; the vocoder is always float32 inside.
        cast = self.dtype if self.dtype != jnp.float32 and component != "vocoder" else None

        def adapt(model: nnx.Module) -> None:
            loras = [(lora.path, strength) for lora, strength in zip(self.loras, self.strengths, strict=True)]
            adapt_component(model, component, self.manifest, attention=self.way.attention, loras=loras)

        if component == "transformer":
            self._strengths = self.strengths
        offload = component in self.way.offload
        return load_component(self.folder, self.manifest, component, dtype=cast, offload=offload, adapt=adapt)

    def turn(self, *components: str) -> None:
        """A stage with these models begins: all others make room, unless there is room for all."""
        if not self.way.keep_models:
            self.free(*(name for name in self.loaded if name not in components))

    def free(self, *components: str) -> None:
        """Drops models, so that their memory can be used by others."""
        for component in components:
            self.loaded.pop(component, None)

    def retreat(self) -> bool:
        """Frees everything and takes the next smaller way; False if there is none."""
        smaller = self.way.smaller()
        self.free(*tuple(self.loaded))
        if smaller is None:
            return False
        self.way = smaller
        return True


def adapt_component(
    model: nnx.Module,
    component: str,
    manifest: Manifest,
    *,
    attention: AttentionForm,
    loras: Sequence[tuple[Path, float]],
) -> None:
    """What a run changes in a model, abstract or not, in place: the form of attention, and LoRAs of the transformer."""
    set_attention_form(model, attention)
    if component == "transformer" and loras:
        add_loras(model, loras, manifest.linears_below("model.diffusion_model.", component))
