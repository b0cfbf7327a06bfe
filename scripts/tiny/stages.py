"""What the stages of training share: their configuration, their schedule, and the models that earlier ones left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from convert.official import read_official
from ltx_jax.checkpoint import MODELS
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.training.loop import Schedule, Trainer
from scripts.tiny import release


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of the release: where it is kept, and how long a stage of it is."""

    folder: Path
    num_steps: int  # of the stage
    seed: int = 0
    num_clips: int = 8000  # whose latents the transformer and the upscaler are trained on


# A trainer and its batches. What is made is left in FOLDER/STAGE.safetensors.
Stage = tuple[Trainer, Callable[[int], Any]]
CONFIGS = release.configs()

# The model that each stage leaves, but for the transformer's, which leaves its connectors as well.
COMPONENTS = {
    "video-vae": "video_vae",
    "video-vae-sharp": "video_vae",
    "video-vae-fine": "video_vae",
    "video-decoder": "video_vae",
    "audio-vae": "audio_vae",
    "vocoder": "vocoder",
    "vocoder-fine": "vocoder",
    "bandwidth": "vocoder",
    "language": "gemma",
    "upscaler": "upscaler_spatial_x2",
    "transformer": "transformer",
}
# The last stage of each model: what the release holds.
FINAL = {
    "video_vae": "video-decoder",
    "audio_vae": "audio-vae",
    "vocoder": "bandwidth",
    "gemma": "language",
    "transformer": "transformer-fine",
    "connectors": "transformer-fine",
    "upscaler_spatial_x2": "upscaler",
}


def muon(num_steps: int, seed: int, *, learning_rate: float = 1e-2) -> Schedule:
    """How models are trained from nothing here."""
    return Schedule(
        num_steps=num_steps, learning_rate=learning_rate, optimizer="muon", warmup_steps=50, seed=seed,
        average_decay=0.998,
    )  # fmt: skip


def trained(folder: Path, stage: str, component: str | None = None) -> Any:
    """The model that a finished stage left, in the precision that it is released in.

    Raises FileNotFoundError where there is none.
    """
    path = folder / f"{stage}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {stage}.safetensors: run `python -m scripts.tiny.train {stage} {folder}` first"
        )
    return read(path, component or COMPONENTS[stage])


def read(path: Path, component: str) -> Any:
    """A model of the miniature release from a file of official tensors; raises as `read_official` does."""
    model = MODELS.get(component, LatentUpscaler)(CONFIGS.of(component), rngs=nnx.Rngs(0))
    read_official(path, component, model, upscalers=CONFIGS.upscalers)
    return model
