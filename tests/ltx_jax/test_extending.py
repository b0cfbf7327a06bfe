"""docs/extending.md: its code runs, and does what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest

from ltx_jax.guidance import guide
from ltx_jax.sampling import euler

PAGE = Path(__file__).parents[2] / "docs/extending.md"
LEVELS = (1.0, 0.6, 0.2, 0.0)


@pytest.fixture(scope="module")
def page(mini_checkpoint):
    """The names that the page's code leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    source = "\n".join(blocks)
    assert '"outputs/ltx-2.3-tiny"' in source
    names: dict = {}
    exec(compile(source.replace('"outputs/ltx-2.3-tiny"', repr(str(mini_checkpoint))), PAGE.name, "exec"), names)
    return names


def test_the_page_makes_clips(page):
    assert page["clip"].frames.shape == page["frames"].shape == (9, 64, 96, 3)
    assert page["waveform"].shape[1] == 2
    assert [step for step, _ in page["heard"]] == list(range(8))
    assert page["heard"][0][1] == 1.0


@pytest.fixture(scope="module")
def make(page):
    return lambda **more: page["pipe"].generate_latents(
        page["Settings"](width=96, height=64, num_frames=9, sigmas=LEVELS, **more.pop("settings", {})),
        prompt=page["prompt"],
        negative=page["pipe"].encode_prompt("grey"),
        **more,
    )


def test_the_sampler_without_its_correction_is_euler(page, make):
    """A few operations in another order, over three steps that feed on each other's rounding."""

    def plain(predict, tokens, sigmas):
        return page["heun"](predict, tokens, sigmas, correction=0.0)

    ours, theirs, corrected = make(sampler=plain), make(sampler=euler), make(sampler=page["heun"])
    np.testing.assert_allclose(ours.video, theirs.video, atol=2e-4)
    assert np.abs(corrected.video - theirs.video).max() > 1e-2


def test_the_guider_with_all_of_the_parallel_part_is_the_default_one(page, make):
    """Guidance adds a difference of estimates: rounding of one order of sums, over three steps."""
    settings = {"video_cfg_scale": 3.0, "audio_cfg_scale": 2.0}
    whole = make(settings=settings, guider=page["projected"](1.0))
    default = make(settings=settings, guider=guide)
    less = make(settings=settings, guider=page["projected"](0.0))
    np.testing.assert_allclose(whole.video, default.video, atol=2e-4)
    assert np.abs(less.video - default.video).max() > 1e-3


def test_the_condition_holds_what_it_gives(page, make):
    pipe, bell = page["pipe"], page["bell"]
    plain, made = make(), make(conditions=[page["opening"](bell, 48_000)])
    latents = pipe.encode_audio(bell, 48_000, num_latents=plain.audio.shape[1], seconds=9 / 24)
    held = 5  # latent frames of 40 ms that lie within 0.2 s, the first 10 ms
    np.testing.assert_array_equal(made.audio[:, :held], latents[:, :held])
    assert np.abs(made.audio[:, held + 1 :] - latents[:, held + 1 :]).max() > 1e-2
    assert np.abs(made.audio - plain.audio).max() > 1e-2


def test_a_sampler_that_adds_noise_is_given_it(make):
    """From the seed: the same again, another with another seed."""
    seen = []

    def noisy(predict, tokens, sigmas, *, noise):
        seen.append(noise(tokens))
        return euler(predict, tokens, sigmas)

    for seed in (1, 1, 2):
        make(sampler=noisy, settings={"seed": seed})
    assert seen[0].video.shape[1] == 2 * 2 * 3
    np.testing.assert_array_equal(seen[0].video, seen[1].video)
    assert np.abs(seen[0].video - seen[2].video).max() > 0.1
