"""The denoising step as it is compiled for a card: nothing large is there twice, and memory is what we say it is."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ltx_jax.cards import find_card
from ltx_jax.checkpoint import published_manifest
from ltx_jax.plan import make_plan
from ltx_jax.planner import Planner
from ltx_jax.presets import LTX_2_3
from ltx_jax.settings import Settings
from tests.hlwq_jax.hlo import buffers, needs_card_compiler

GiB = 2**30
VIDEO_TOKENS, AUDIO_TOKENS = 6144, 126  # of 768x512, 121 frames


def planner(num_blocks: int, settings: Settings, card: str = "rtx4090") -> Planner:
    metadata = LTX_2_3 | {"transformer": LTX_2_3["transformer"] | {"num_layers": num_blocks}}
    target = find_card(card)
    return Planner(
        published_manifest(metadata=metadata),
        settings,
        target=target,
        dtype=jnp.dtype(jnp.bfloat16),
        offload="none",
        attention="chunked",
        limit_bytes=target.memory_bytes,
        loras=(),
        told=lambda stage: None,
    )


def lowered(planner: Planner) -> Any:
    """The step of the last stage, compiled."""
    from ltx_jax.denoise import Denoiser, Pair, estimate

    states = planner.states(planner.denoising[-1])
    denoiser = Denoiser(planner.model("transformer"), states, planner.prompt(), precision="default")
    arguments = denoiser.arguments(1.0, Pair(*(None if state is None else state.initial for state in states)))
    sharding = jax.sharding.SingleDeviceSharding(planner.target.device())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "dtype") else x, arguments
    )
    return estimate.lower(*shapes, **denoiser.options).compile()


@pytest.fixture(scope="module")
def step():
    """Four real blocks at 768x512 with 121 frames, for an RTX 4090."""
    made = planner(4, Settings(width=768, height=512, num_frames=121))
    return made, lowered(made)


@needs_card_compiler
def test_no_weight_is_held_in_float32_nor_twice_in_bfloat16(step):
    _, compiled = step
    weights = {(16384, 4096), (4096, 16384), (4096, 4096), (8192, 2048), (2048, 8192), (2048, 4096), (4096, 2048)}
    rows = 4096 * 4096
    wide = [b for b in buffers(compiled.as_text()) if b.dtype == "f32" and b.size >= rows and b.shape in weights]
    # Scores and activations may be as large, but not of a weight's shape.
    assert wide == []
    # The largest weight, a feed-forward's, is unpacked once a linear: two linears a stream and block body.
    largest = [b for b in buffers(compiled.as_text()) if b.dtype == "bf16" and b.size == 4 * rows]
    unpacked = [b for b in largest if sorted(b.shape[-2:]) == [4096, 16384] or b.shape[-1] == 128]
    assert len(unpacked) <= 4, unpacked  # the two weights, each before and after its rotation


@needs_card_compiler
def test_scores_of_all_tokens_with_all_tokens_are_never_in_memory(step):
    _, compiled = step
    heads = 32
    for buffer in buffers(compiled.as_text()):
        assert buffer.size < VIDEO_TOKENS * VIDEO_TOKENS * heads // 4, buffer


@needs_card_compiler
def test_temporary_memory_is_as_stated(step):
    _, compiled = step
    analysis = compiled.memory_analysis()
    # Four blocks of 237 MiB packed, and 0.8 GiB outside of the blocks; temporaries do not depend on the depth.
    assert analysis.argument_size_in_bytes / GiB == pytest.approx(1.75, rel=0.1)
    assert analysis.temp_size_in_bytes / GiB == pytest.approx(0.76, rel=0.1)


@needs_card_compiler
def test_an_image_adds_one_row_of_modulation_not_one_a_token(step):
    plain = step[1].memory_analysis().temp_size_in_bytes
    made = planner(4, Settings(width=768, height=512, num_frames=121, image=("any.png",)))
    states = made.states(made.denoising[-1])
    assert states[0] is not None
    assert states[0].shares.shape == (2,)
    with_image = lowered(made).memory_analysis().temp_size_in_bytes
    # Modulation of every token would be 6,144 rows of 9 x 4096 values: 0.42 GiB.
    assert with_image - plain < 0.1 * GiB


BARS = [
    # card, width, height, pipeline, offload, largest peak allowed in GiB
    ("rtx4090", 768, 512, "two-stage", "auto", 16),
    ("rtx4090", 1280, 704, "two-stage", "auto", 18),
    ("rtx4090", 1920, 1088, "two-stage", "auto", 22),
    ("rtx4070", 768, 512, "two-stage", "auto", 10),
    ("rtx4060", 512, 320, "two-stage", "auto", 7),
]


@pytest.mark.slow
@needs_card_compiler
@pytest.mark.parametrize(("card", "width", "height", "pipeline", "offload", "bar"), BARS)
def test_the_whole_model_fits_as_promised(card, width, height, pipeline, offload, bar):
    settings = Settings(width=width, height=height, num_frames=121, pipeline=pipeline)
    plan = make_plan(
        published_manifest(), settings, target=find_card(card), dtype=jnp.bfloat16, offload=offload, attention="chunked"
    )
    assert plan.fits
    assert plan.peak_bytes <= bar * GiB
    decoding = [stage for stage in plan.stages if stage.name == "decode video"]
    denoising = [stage for stage in plan.stages if stage.name.startswith("denoise")]
    assert decoding[0].peak_bytes <= max(stage.peak_bytes for stage in denoising)
    assert bool(plan.offload) == (card != "rtx4090")
