"""Plans: of a checkpoint for the device at hand, of the published model for named cards, and what follows from them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
import ltx_jax.engine as engine_module
from ltx_jax import Settings, load_pipeline
from ltx_jax.cards import CARDS, CardError, find_card
from ltx_jax.checkpoint import Configs, Manifest, parameter_shapes, part_of, published_manifest
from ltx_jax.media import write_mp4
from ltx_jax.memory import measure, nbytes
from ltx_jax.models.transformer import Transformer
from ltx_jax.offload import Streamed
from ltx_jax.plan import TILES, Plan, PlanError, make_plan, nearest_sizes, plan_table, usable_bytes
from ltx_jax.planner import split_layers
from ltx_jax.presets import GEMMA_3_12B, LTX_2_3, UPSCALERS
from ltx_jax.residency import Way
from tests.conftest import STREAMED_ATOL
from tests.hlwq_jax.hlo import needs_card_compiler

GiB = 2**30
SMALL = {"width": 96, "height": 64, "num_frames": 17, "seed": 3}


@pytest.fixture(scope="module")
def manifest(mini_checkpoint):
    return Manifest.read(mini_checkpoint)


def plan_of(manifest, limit=64 * GiB, **settings):
    """A plan for the CPU at hand, as if it had `limit` bytes."""
    chosen = Settings(**SMALL | settings)
    return make_plan(manifest, chosen, target=jax.devices()[0], dtype=jnp.float32, limit_bytes=limit)


@pytest.fixture(scope="module")
def roomy(manifest):
    return plan_of(manifest)


def test_cards_are_found_however_they_are_written():
    assert find_card("RTX 4090") is find_card("NVIDIA GeForce RTX 4090") is find_card("4090") is CARDS["rtx4090"]
    assert find_card("RTX 4060 Ti 16GB").name == "rtx4060ti16gb"


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(CardError, match=r"rtx3060.*rtx4090.*h100"):
        find_card("voodoo2")


@needs_card_compiler
@pytest.mark.parametrize("name", CARDS)
def test_every_card_can_be_compiled_for(name):
    shape = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    found = measure(find_card(name), jax.jit(lambda x: jnp.tanh(x) @ x), shape)
    assert found.argument_bytes == 256 * 256 * 2


def test_the_published_manifest_names_what_a_whole_model_has():
    shallow = LTX_2_3 | {"transformer": LTX_2_3["transformer"] | {"num_layers": 3}}
    found = published_manifest(metadata=shallow)
    configs = Configs.from_metadata(shallow, GEMMA_3_12B, UPSCALERS, num_hidden_states=49)
    model = configs.abstract("transformer")
    shapes = parameter_shapes(model)
    assert found.parts["transformer"] == sorted({part_of("transformer", path) for path in shapes})
    assert len(found.quantized["transformer"]) == 3 * 28
    for path, shape in found.quantized["transformer"].items():
        assert shapes[f"{path}.kernel"] == (shape.in_features, shape.out_features)


def test_a_plan_with_room_keeps_all_models_and_the_largest_tiles(roomy):
    assert roomy.fits
    assert roomy.keep_models
    assert roomy.offload == ()
    assert roomy.tile == TILES[0]
    names = [stage.name for stage in roomy.stages]
    assert names == ["text encoder", "connectors", "denoise", "decode audio", "decode video"]


def test_weights_of_a_stage_are_those_that_loading_puts_on_the_device(roomy, mini_checkpoint):
    pipe = load_pipeline(mini_checkpoint)
    for stage in roomy.stages:
        held = sum(nbytes(pipe.model(name)) for name in stage.models)
        inputs = 2**20  # tokens and contexts of so small a clip take less
        assert held <= stage.argument_bytes <= held + inputs, stage.name


def test_two_stages_and_an_image_have_their_own_stages(manifest, tmp_path):
    plan = plan_of(manifest, width=128, height=128, pipeline="two-stage", image=(str(tmp_path / "any.png"),))
    names = [stage.name for stage in plan.stages]
    assert "encode image" in names
    assert names.index("denoise, stage 1") < names.index("upscale") < names.index("denoise, stage 2")
    upscaling = plan.stages[names.index("upscale")]
    assert upscaling.held_bytes > 0  # the transformer, needed again


def test_less_memory_means_streaming_and_smaller_tiles(manifest, roomy):
    transformer = next(stage for stage in roomy.stages if stage.name == "denoise")
    tight = plan_of(manifest, limit=transformer.peak_bytes - 2**20)
    assert "transformer" in tight.offload
    assert not tight.keep_models
    streamed = next(stage for stage in tight.stages if stage.name == "denoise")
    assert streamed.streamed
    assert streamed.peak_bytes < transformer.peak_bytes
    assert streamed.host_bytes > 0


def test_decoding_needs_no_more_than_denoising_or_takes_the_smallest_tiles(roomy):
    denoising = max(stage.peak_bytes for stage in roomy.stages if stage.name.startswith("denoise"))
    decoding = next(stage for stage in roomy.stages if stage.name == "decode video")
    assert decoding.peak_bytes <= denoising or roomy.tile == TILES[-1]


def test_plans_are_kept_and_read_back(manifest, roomy, monkeypatch):
    assert Plan.from_json(json.loads(json.dumps(roomy.as_json()))) == roomy
    monkeypatch.setattr("ltx_jax.planner.Planner.plan", lambda self: pytest.fail("the plan was kept"))
    assert plan_of(manifest) == roomy
    assert plan_of(manifest, seed=4, prompt="another") == roomy  # they change no shape
    with pytest.raises(pytest.fail.Exception):
        plan_of(manifest, num_frames=25)


def test_a_plan_prints_every_stage(roomy):
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(roomy))
    text = console.export_text()
    assert all(stage.name in text for stage in roomy.stages)
    assert "peak" in roomy.line()


def test_a_clip_that_does_not_fit_is_refused_with_sizes_that_do(mini_checkpoint, manifest, roomy, monkeypatch, capsys):
    tight = plan_of(manifest, limit=1)  # everything streamed, smallest tiles
    assert not tight.fits
    monkeypatch.setattr("ltx_jax.plan.usable_bytes", lambda target: tight.peak_bytes - 1)
    pipe = load_pipeline(mini_checkpoint)
    smaller = Settings(width=64, height=64, num_frames=9)
    monkeypatch.setattr("ltx_jax.plan.nearest_sizes", lambda *args, **kwargs: [smaller])
    settings = Settings(**SMALL)
    with pytest.raises(PlanError, match=r"96x64 with 17 frames does not fit.*What fits: 64x64 with 9 frames") as error:
        pipe.plan(settings)
    sides = [f"--{name.replace('_', '-')}={size}" for name, size in SMALL.items()]
    assert generate.main(["--checkpoint", str(mini_checkpoint), "--plan", *sides]) == 0
    told = capsys.readouterr().out
    assert all(stage.name in told for stage in tight.stages)
    assert str(error.value) in told
    monkeypatch.setattr("ltx_jax.plan.nearest_sizes", lambda *args, **kwargs: [])
    with pytest.raises(PlanError, match="No smaller size fits"):
        pipe.plan(settings)


@pytest.mark.parametrize("fixed", [0, 10**6])
def test_the_nearest_sizes_are_the_largest_that_fit(roomy, fixed):
    """With memory as it grows: in proportion to the volume, beside what is always there."""
    asked = Settings(width=192, height=128, num_frames=65, aspect=None)

    def make(settings: Settings) -> Plan:
        volume = (settings.width or 0) * (settings.height or 0) * (settings.num_frames or 0)
        stage = replace(roomy.stages[0], argument_bytes=fixed, added_bytes=volume, held_bytes=0, host_bytes=0)
        size = {"width": settings.width, "height": settings.height, "num_frames": settings.num_frames}
        return replace(roomy, stages=(stage,), limit_bytes=fixed + 192 * 128 * 40, **size)

    narrower, shorter = nearest_sizes(make, asked, make(asked), step=32, frames=8)
    assert (narrower.width, narrower.height, narrower.num_frames) == (128, 96, 65)
    assert (shorter.width, shorter.height, shorter.num_frames) == (192, 128, 33)


def test_a_card_leaves_room_for_its_driver():
    card = find_card("rtx4090")
    assert card.memory_bytes - 1.5 * GiB < usable_bytes(card) < card.memory_bytes - 0.6 * GiB


def test_streamed_layers_are_described_without_weights(manifest):
    from ltx_jax.load import abstract_component

    model = abstract_component(manifest, "transformer")
    rest, layouts = split_layers(model)
    assert len(layouts["blocks"]) == 2
    assert len(rest.blocks) == 0
    assert len(model.blocks) == 1  # the model itself stays whole


# ------------------------------------------------------------------ running out


class OutOfMemory:
    """Fails as a device that is out of memory, the first time."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return self.function(*args, **kwargs)


def test_out_of_memory_runs_the_stage_again_streamed_with_the_same_result(mini_checkpoint, monkeypatch):
    settings = Settings(**SMALL, prompt="a red ball", sigmas=(1.0, 0.5, 0.0))
    whole = load_pipeline(mini_checkpoint).generate_latents(settings)
    streamed = load_pipeline(mini_checkpoint, offload="blocks").generate_latents(settings)

    said = []
    pipe = load_pipeline(mini_checkpoint)
    monkeypatch.setattr(pipe.progress, "say", said.append)
    monkeypatch.setattr("ltx_jax.denoise.estimate", OutOfMemory(pytest.fail))
    found = pipe.generate_latents(settings)
    assert "transformer" in pipe.residency.way.offload
    assert any("out of memory" in text for text in said)
    # From the same noise, by the same programs as where blocks were streamed from the start.
    np.testing.assert_array_equal(found.video, streamed.video)
    np.testing.assert_array_equal(found.audio, streamed.audio)
    np.testing.assert_allclose(found.video, whole.video, rtol=0, atol=STREAMED_ATOL)
    np.testing.assert_allclose(found.audio, whole.audio, rtol=0, atol=STREAMED_ATOL)


def test_blocks_are_streamed_where_that_is_asked_for_and_no_plan_is_made(mini_checkpoint):
    pipe = load_pipeline(mini_checkpoint, offload="blocks")
    pipe.generate_latents(Settings(**SMALL, prompt="a red ball", sigmas=(1.0, 0.0)))
    assert isinstance(pipe.model("transformer"), Streamed)
    assert isinstance(load_pipeline(mini_checkpoint).model("transformer"), Transformer)


def test_running_out_while_decoding_loses_no_frame(mini_checkpoint, monkeypatch):
    pipe = load_pipeline(mini_checkpoint)
    latents = np.random.default_rng(0).normal(size=(1, 13, 2, 3, 16)).astype(np.float32)
    expected = np.concatenate(list(pipe.decode_video(jnp.asarray(latents))))

    decode = engine_module.decode_pixels
    calls = []

    def fails_at_the_second_tile(*args):
        calls.append(args)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return decode(*args)

    monkeypatch.setattr(engine_module, "decode_pixels", fails_at_the_second_tile)
    found = np.concatenate(list(pipe.decode_video(jnp.asarray(latents))))
    assert found.shape == expected.shape
    assert pipe.residency.way.tile == TILES[1]
    # The frames that were out are the same; those after are of smaller tiles, which blend a little differently.
    assert np.mean(np.abs(found.astype(int) - expected.astype(int))) < 2


def test_another_fault_is_not_taken_for_want_of_memory(mini_checkpoint, monkeypatch):
    pipe = load_pipeline(mini_checkpoint)

    def broken(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr("ltx_jax.denoise.estimate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        pipe.generate_latents(Settings(**SMALL, prompt="a red ball", sigmas=(1.0, 0.0)))
    assert pipe.residency.way == Way()


def test_there_is_a_last_way():
    way, seen = Way(), []
    while way is not None:
        seen.append(way)
        way = way.smaller()
    assert len(seen) == len(TILES)
    assert seen[-1].tile == TILES[-1]


# -------------------------------------------------------------------- known prompts


def test_a_known_prompt_needs_no_text_encoder(mini_checkpoint):
    first = load_pipeline(mini_checkpoint)
    expected = first.encode_prompt("a blue square crosses the meadow")
    second = load_pipeline(mini_checkpoint)
    found = second.encode_prompt("a blue square crosses the meadow")
    assert "gemma" not in second.residency.loaded
    np.testing.assert_array_equal(found.video, expected.video)
    np.testing.assert_array_equal(found.audio, expected.audio)
    third = load_pipeline(mini_checkpoint, keep_prompts=False)
    third.encode_prompt("a blue square crosses the meadow")
    assert "gemma" in third.residency.loaded


def test_models_take_turns_where_there_is_no_room_for_all(mini_checkpoint):
    pipe = load_pipeline(mini_checkpoint, keep_prompts=False)
    pipe.residency.way = Way(keep_models=False, offload=("gemma", "connectors", "transformer"))
    seen = []
    loaded = pipe.residency.get

    def get(component):
        model = loaded(component)
        seen.append(tuple(pipe.residency.loaded))
        return model

    pipe.residency.get = get
    pipe(prompt="a red ball", **SMALL, sigmas=(1.0, 0.0))
    assert max(len(models) for models in seen) == 2
    assert {frozenset(models) for models in seen if len(models) == 2} == {frozenset({"audio_vae", "vocoder"})}


# ---------------------------------------------------------------------- recompiling


def test_nothing_is_compiled_again_for_another_prompt_seed_scale_schedule_or_image(mini_checkpoint):
    pipe = load_pipeline(mini_checkpoint)
    image = np.zeros((64, 96, 3), np.uint8)
    first = Settings(**SMALL, prompt="one", pipeline="dev", steps=2, image_crf=None)
    pipe.generate_latents(first, image=image)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        other = replace(
            first, prompt="two, longer", seed=9, video_cfg_scale=2.5, audio_stg_scale=0.5, video_rescale=0.1
        )
        pipe.generate_latents(other, image=image + 9)
        pipe.generate_latents(replace(other, sigmas=(0.9, 0.4, 0.1, 0.0), image_strength=0.7), image=image)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_a_clip_that_is_upscaled_needs_no_text_and_no_transformer(manifest, tmp_path):
    write_mp4(tmp_path / "clip.mp4", np.zeros((9, 64, 64, 3), np.uint8), fps=24.0)
    size = {"width": None, "height": None, "num_frames": None}
    tool = plan_of(manifest, video=tmp_path / "clip.mp4", upscale=2.0, **size)
    names = [stage.name for stage in tool.stages]
    assert names == ["encode video", "upscaler spatial x2", "decode audio", "decode video"]
