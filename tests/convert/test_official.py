"""Models written as published files: every parameter under its name, and the whole converted like any other."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from convert.__main__ import main
from convert.official import official_tensors, read_official, write_gemma, write_official
from ltx_jax.checkpoint import MODELS, Configs, Manifest
from ltx_jax.config import AudioVAEConfig
from ltx_jax.load import load_component
from ltx_jax.stack import stack_layers


@pytest.fixture(scope="module")
def metadata(mini_release: Path) -> dict:
    release = mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    with safe_open(release, "numpy") as file:
        return json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def gemma_metadata(mini_release: Path) -> dict:
    return json.loads((mini_release / "gemma-3-mini/config.json").read_text())


@pytest.fixture(scope="module")
def models(metadata: dict, gemma_metadata: dict) -> dict[str, nnx.Module]:
    layers = gemma_metadata.get("text_config", gemma_metadata)["num_hidden_layers"]
    configs = Configs.from_metadata(metadata, gemma_metadata, num_hidden_states=layers + 1)
    return {part: filled(configs, part) for part in configs.components}


def filled(configs: Configs, component: str) -> nnx.Module:
    """A model with values of bfloat16, without running its initialisers."""
    model = configs.abstract(component)
    rng = np.random.default_rng(0)
    state = nnx.state(model)
    for _, variable in nnx.to_flat_state(state):
        value = rng.normal(size=variable.get_value().shape).astype(jax.numpy.bfloat16)
        variable.set_value(jax.numpy.asarray(value, jax.numpy.float32))
    nnx.update(model, state)
    return model


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(model))}


def test_written_models_are_read_back(models, metadata, tmp_path):
    write_official(tmp_path / "official.safetensors", models, metadata)
    for component in ("transformer", "vocoder"):
        empty = jax.tree.map(lambda x: jax.numpy.zeros_like(x), models[component])
        read_official(tmp_path / "official.safetensors", component, empty)
        found = parameters(empty)
        for name, value in parameters(models[component]).items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_written_checkpoint_converts(models, metadata, gemma_metadata, mini_release, tmp_path):
    write_official(tmp_path / "official.safetensors", models, metadata)
    write_gemma(tmp_path / "gemma", models["gemma"], gemma_metadata)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gemma" / name).write_bytes((mini_release / "gemma-3-mini" / name).read_bytes())
    arguments = [str(tmp_path / "official.safetensors"), str(tmp_path / "out"), "--gemma", str(tmp_path / "gemma")]
    assert main([*arguments, "--gemma-bits", "16"]) == 0
    found = load_component(tmp_path / "out", Manifest.read(tmp_path / "out"), "audio_vae")
    expected = parameters(models["audio_vae"])
    for name, value in parameters(found).items():
        np.testing.assert_array_equal(value.astype(np.float32), expected[name], err_msg=name)


def test_what_cannot_be_published_is_said(models, metadata, tmp_path):
    with pytest.raises(ValueError, match="missing: vocoder"):
        write_official(tmp_path / "x.safetensors", {k: v for k, v in models.items() if k != "vocoder"}, metadata)
    with pytest.raises(ValueError, match="not finite"):
        write_official(tmp_path / "x.safetensors", {**models, "audio_vae": with_nan(models["audio_vae"])}, metadata)
    assert not (tmp_path / "x.safetensors").exists()


def with_nan(model: nnx.Module) -> nnx.Module:
    return jax.tree.map(lambda x: x * np.nan, model)


def test_a_file_of_another_model_is_refused(models, metadata, tmp_path):
    write_official(tmp_path / "official.safetensors", models, metadata)
    config = replace(AudioVAEConfig.from_metadata(metadata["audio_vae"]), latent_channels=4)
    other = MODELS["audio_vae"](config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="does not hold this audio_vae"):
        read_official(tmp_path / "official.safetensors", "audio_vae", other)


def test_stacked_layers_are_refused(models):
    gdef, state = nnx.split(models["transformer"])
    stacked = nnx.merge(gdef, state)
    stacked.blocks = stack_layers(list(stacked.blocks))
    with pytest.raises(ValueError, match="unstacked"):
        official_tensors("transformer", stacked)
