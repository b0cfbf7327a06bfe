"""Guidance against the reference, and which passes it asks for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ltx_jax.guidance import Guidance, Scales, guide, keep_masks
from tests.conftest import DATA

CASES = json.loads((DATA / "ltx/index.json").read_text())["sampling"]["info"]["guide"]


@pytest.mark.parametrize("name", CASES)
def test_guided_estimate_agrees_with_the_reference(reference, name):
    data = reference("sampling")
    settings = CASES[name]
    parts = {"conditional": "x0", "unconditional": "uncond", "perturbed": "perturbed", "isolated": "isolated"}
    ours = guide(
        {name: jnp.asarray(data[f"step.{part}"]) for name, part in parts.items()},
        Scales(
            cfg=settings.get("cfg_scale", 1.0),
            stg=settings.get("stg_scale", 0.0),
            modality=settings.get("modality_scale", 1.0),
            rescale=settings.get("rescale_scale", 0.0),
        ),
    )
    np.testing.assert_allclose(ours, data[f"guide.{name}"], atol=2e-6, rtol=0)  # values up to 20, a few operations


def test_only_needed_passes_run():
    assert Guidance().passes == ()
    assert Guidance(cfg_scale=3.0, modality_scale=2.0).passes == ("unconditional", "isolated")
    assert Guidance(stg_scale=1.0, stg_blocks=(0,)).passes == ("perturbed",)


def test_keep_masks_skip_what_each_pass_perturbs():
    video = Guidance(stg_scale=1.0, stg_blocks=(1,), modality_scale=3.0)
    keep = keep_masks(("unconditional", "perturbed", "isolated"), video, Guidance(), 3)
    assert keep is not None
    np.testing.assert_array_equal(keep.video_self, [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(keep.audio_self, np.ones((3, 4)))  # audio is not STG-guided here
    np.testing.assert_array_equal(keep.audio_to_video, [[1, 1, 1, 0]] * 3)
    assert keep_masks(("unconditional",), video, Guidance(), 3) is None
    with pytest.raises(ValueError, match=r"block 5.*blocks 0 to 2"):
        keep_masks(("perturbed",), Guidance(stg_scale=1.0, stg_blocks=(5,)), Guidance(), 3)


def test_skipped_steps_come_between_guided_ones():
    assert [Guidance(skip_step=2).runs(step) for step in range(5)] == [True, False, False, True, False]
