"""Settings to schedules and guidance."""

import numpy as np
import pytest

from ltx_jax.sampling import DISTILLED_SIGMAS, ltx2_sigmas
from ltx_jax.settings import Settings


def test_each_pipeline_has_its_schedule():
    np.testing.assert_array_equal(Settings().schedule(), np.float32(DISTILLED_SIGMAS))
    np.testing.assert_array_equal(Settings(pipeline="dev").schedule(), ltx2_sigmas(30))
    np.testing.assert_array_equal(Settings(pipeline="dev", steps=6).schedule(), ltx2_sigmas(6))
    np.testing.assert_array_equal(Settings(pipeline="two-stage", video_cfg_scale=3.0).schedule(), ltx2_sigmas(30))
    np.testing.assert_array_equal(Settings(sigmas=(1.0, 0.5, 0.0)).schedule(), [1, 0.5, 0])


def test_dev_is_guided_as_released_and_others_are_not():
    assert Settings().guidance(48) is None
    guidance = Settings(pipeline="dev").guidance(48)
    assert guidance is not None
    video, audio = guidance
    assert (video.cfg_scale, audio.cfg_scale, video.stg_blocks, video.rescale) == (3.0, 7.0, (28,), 0.7)


def test_given_scales_replace_defaults_alone():
    guidance = Settings(pipeline="dev", audio_cfg_scale=5.0, stg_blocks=(1,)).guidance(2)
    assert guidance is not None
    assert (guidance[1].cfg_scale, guidance[1].stg_scale, guidance[0].stg_blocks) == (5.0, 1.0, (1,))
    guidance = Settings(video_cfg_scale=2.0).guidance(2)
    assert guidance is not None
    assert (guidance[0].passes, guidance[1].passes) == (("unconditional",), ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5}, "8 fixed steps"),
        ({"pipeline": "dev", "steps": 0}, "at least 1"),
        ({"sigmas": (0.5, 0.9)}, "must fall"),
        ({"sigmas": (1.0,)}, "at least two"),
        ({"stage_2_sigmas": (0.5, 0.5)}, "stage_2_sigmas must fall"),
        ({"image_strength": 2.0}, "from 0 to 1"),
        ({"image_crf": 99}, "from 0"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_say_what_would_do(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).check()


def test_stg_needs_blocks():
    with pytest.raises(ValueError, match="stg_blocks"):
        Settings(video_stg_scale=1.0).guidance(2)
