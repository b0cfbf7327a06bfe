"""The transformer against the reference, as a list of blocks and under scan."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from convert.tables.transformer import TRANSFORMER
from ltx_jax.config import TransformerConfig
from ltx_jax.models.transformer import Keep, StreamInput, Transformer
from ltx_jax.stack import Stack, stack_layers
from tests.conftest import DATA, fill, read_prefix

# One forward pass in float32: rounding of other summation orders, as the reference's README suggests.
TOLERANCE = 2e-5


def load(stacked: bool) -> Transformer:
    config = TransformerConfig.from_metadata(json.loads((DATA / "ltx/config.json").read_text())["transformer"])
    tensors = read_prefix(DATA / "ltx/checkpoint.safetensors", "model.diffusion_model.")
    tensors = {k: v for k, v in tensors.items() if "connector" not in k}
    model = fill(lambda: Transformer(config, rngs=nnx.Rngs(0)), TRANSFORMER, tensors)
    if stacked:
        model.blocks = stack_layers(model.blocks)
        assert isinstance(model.blocks[0], Stack)
    return model


@pytest.fixture(scope="module", params=["list", "scan"])
def model(request) -> Transformer:
    return load(request.param == "scan")


@jax.jit
def predict(model, video, audio, keep):
    return model(video, audio, keep=keep)


def inputs(data: dict, modality: str, sigma, timesteps=None, rows=slice(None), **more) -> StreamInput:
    tokens = data[f"in.{modality}.latent"][rows]
    return StreamInput(
        tokens=jnp.asarray(tokens),
        timesteps=jnp.asarray(sigma[:, None] if timesteps is None else timesteps[..., 0]),
        sigma=jnp.asarray(sigma),
        positions=jnp.asarray(rearrange(data[f"in.{modality}.positions"][rows], "b axes t ends -> b t axes ends")),
        context=jnp.asarray(data[f"in.{modality}.context"][rows]),
        **more,
    )


def case(data: dict, name: str) -> tuple[StreamInput | None, StreamInput | None, Keep | None]:
    sigma = data[f"{name}.in.sigma"] if f"{name}.in.sigma" in data else data["uniform.in.sigma"]
    if name == "perturbed":
        rows = np.zeros(5, int)
        keep = Keep(*(jnp.asarray(k) for k in data["perturbed.in.keep_masks"]))
        return inputs(data, "video", sigma, rows=rows), inputs(data, "audio", sigma, rows=rows), keep
    if name == "pertoken":
        audio_sigma = data["pertoken.in.audio_sigma"]
        return (
            inputs(data, "video", sigma, data["pertoken.in.video.timesteps"]),
            inputs(data, "audio", audio_sigma, data["pertoken.in.audio.timesteps"]),
            None,
        )
    video, audio = inputs(data, "video", sigma), inputs(data, "audio", sigma)
    if name == "masked":
        mask = jnp.asarray(data["masked.in.context_mask"], jnp.float32)
        video = replace(video, self_mask=jnp.asarray(data["masked.in.self_mask"]), context_mask=mask)
    if name == "frozen_audio":
        audio = inputs(data, "audio", np.zeros_like(sigma))
    return None if name == "audio_only" else video, None if name == "video_only" else audio, None


@pytest.mark.parametrize(
    "name", ["uniform", "pertoken", "perturbed", "masked", "frozen_audio", "audio_only", "video_only"]
)
def test_velocity_and_denoised_agree_with_the_reference(model, reference, name):
    data = reference("transformer")
    video, audio, keep = case(data, name)
    velocity = predict(model, video, audio, keep)
    for modality, x, v in (("video", video, velocity.video), ("audio", audio, velocity.audio)):
        if x is None:
            assert v is None
            continue
        np.testing.assert_allclose(v, data[f"{name}.out.{modality}"], atol=TOLERANCE, rtol=0)
        denoised = x.tokens - x.timesteps[..., None] * v
        np.testing.assert_allclose(denoised, data[f"{name}.out.x0_{modality}"], atol=TOLERANCE, rtol=0)


def test_a_disabled_video_is_read_but_not_updated(model, reference):
    data = reference("transformer")
    video, audio, _ = case(data, "video_disabled")
    velocity = predict(model, replace(video, enabled=False), audio, None)
    np.testing.assert_allclose(velocity.audio, data["video_disabled.out.audio"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(velocity.video, data["video_disabled.out.video"], atol=TOLERANCE, rtol=0)
