"""The real LTX-2.3: 5,947 tensors, 23 billion parameters, every one used once and every parameter filled once."""

from collections import Counter
from math import prod

import pytest

from convert.inventory import Expected
from convert.mapping import plan
from convert.quantizing import OPTIONAL, Quantizing
from convert.tables import MAIN
from ltx_jax.checkpoint import Configs
from ltx_jax.presets import LTX_2_3, NUM_HIDDEN_STATES

# Tensors and parameters by prefix, as counted in the reference.
COUNTS = {
    "model.diffusion_model.transformer_blocks.": (4_128, 18_561_377_280),
    "model.diffusion_model.": (58, 427_460_864),
    "model.diffusion_model.video_embeddings_connector.": (129, 1_612_546_304),
    "model.diffusion_model.audio_embeddings_connector.": (129, 403_620_096),
    "text_embedding_projection.": (4, 1_156_061_184),
    "vae.encoder.": (84, 318_936_897),
    "vae.decoder.": (84, 407_169_072),
    "vae.per_channel_statistics.": (2, 256),
    "audio_vae.encoder.": (44, 21_333_008),
    "audio_vae.decoder.": (56, 31_915_138),
    "audio_vae.per_channel_statistics.": (2, 256),
    "vocoder.vocoder.": (667, 115_077_648),
    "vocoder.bwe_generator.": (557, 13_464_600),
    "vocoder.mel_stft.": (3, 542_784),
}
SKIPPED = {"vocoder.mel_stft.stft_fn.inverse_basis": (514, 1, 512)}


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected(Configs.from_metadata(LTX_2_3, num_hidden_states=NUM_HIDDEN_STATES))


@pytest.fixture(scope="module")
def published(expected) -> dict[str, tuple[int, ...]]:
    return {name: target.shape for name, target in expected.targets.items()} | SKIPPED


def test_counts_are_those_of_the_released_file(published):
    tensors, parameters = Counter(), Counter()
    for name, shape in published.items():
        prefix = max((prefix for prefix in COUNTS if name.startswith(prefix)), key=len)
        tensors[prefix] += 1
        parameters[prefix] += prod(shape)
    assert {prefix: (tensors[prefix], parameters[prefix]) for prefix in COUNTS} == COUNTS
    assert (len(published), sum(map(prod, published.values()))) == (5_947, 23_069_505_387)


def test_every_tensor_is_used_once_and_every_parameter_filled_once(expected, published):
    filled = 0
    for component, (prefix, table) in MAIN.items():
        source = {
            name.removeprefix(prefix): shape
            for name, shape in published.items()
            if name not in SKIPPED and expected.targets[name].component == component
        }
        found = plan(table, source, expected.shapes[component])
        assert found.ok, found
        assert len({step.target for step in found.steps}) == len(expected.shapes[component]) == len(source)
        filled += len(source)
    assert filled == 5_946


def test_the_packed_linears_are_1344_with_the_published_shapes(expected):
    linears = {
        name: target.shape
        for name, target in expected.targets.items()
        if target.linear and ".transformer_blocks." in name and "gate" not in name
    }
    assert len(linears) == 1_344
    assert sum(map(prod, linears.values())) == 18_522_046_464
    block = "model.diffusion_model.transformer_blocks.47."
    assert linears[block + "ff.net.0.proj.weight"] == (16384, 4096)
    assert linears[block + "audio_to_video_attn.to_q.weight"] == (2048, 4096)
    assert linears[block + "video_to_audio_attn.to_k.weight"] == (2048, 4096)


def test_what_can_be_quantised_besides_is_counted(expected):
    """By published names, which say what a linear is better than ours, by which it is chosen."""
    quantizing = Quantizing.of(gemma_bits=16, groups=OPTIONAL)
    groups: dict[str, list[str]] = {group: [] for group in OPTIONAL}
    for name, target in expected.targets.items():
        group = quantizing.group(target.component, target.path)
        if group is not None:
            groups[group].append(name)
            assert target.linear
    assert {group: len(names) for group, names in groups.items()} == {
        "blocks": 48 * 28,
        "connectors": 96,
        "projection": 2,
        "adaln": 24,
    }
    assert all("embeddings_connector.transformer_1d_blocks" in name for name in groups["connectors"])
    assert all("adaln_single" in name for name in groups["adaln"])
    assert not any("gate_logits" in name for names in groups.values() for name in names)
