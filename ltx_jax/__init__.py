"""LTX-2.3 as a JAX library: models, sampling, guidance, and the pipeline that joins them."""

from ltx_jax.checkpoint import CheckpointError, Manifest
from ltx_jax.denoise import Denoiser, Pair, Prompt
from ltx_jax.geometry import VideoGrid
from ltx_jax.guidance import Guidance
from ltx_jax.load import load_component
from ltx_jax.pipeline import Clip, ImageCondition, Latents, Pipeline, load_pipeline, save_mp4, save_wav
from ltx_jax.settings import Settings

__all__ = [
    "CheckpointError",
    "Clip",
    "Denoiser",
    "Guidance",
    "ImageCondition",
    "Latents",
    "Manifest",
    "Pair",
    "Pipeline",
    "Prompt",
    "Settings",
    "VideoGrid",
    "load_component",
    "load_pipeline",
    "save_mp4",
    "save_wav",
]
