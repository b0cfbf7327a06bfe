"""Runs that were cut off, and go on."""

import numpy as np
import pytest

from ltx_jax import Settings, load_pipeline
from ltx_jax.denoise import Denoiser, Estimates, Pair
from ltx_jax.replay import Replay, ReplayError

SIZE = {"width": 128, "height": 128, "num_frames": 9, "prompt": "a cat", "seed": 4}
RUNS = {
    "two stages": {"pipeline": "two-stage", "sigmas": (1.0, 0.5, 0.0), "stage_2_sigmas": (0.9, 0.4, 0.0)},
    "hq": {"pipeline": "hq", "steps": 2, "stage_2_sigmas": (0.9, 0.0), "negative_prompt": ""},
    "every other step guided": {"pipeline": "dev", "steps": 4, "video_skip_step": 1, "negative_prompt": ""},
}


class Cut(Exception):
    """The power is gone."""


@pytest.fixture(scope="module")
def pipe(mini_checkpoint):
    return load_pipeline(mini_checkpoint)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(run, pipe, tmp_path, monkeypatch):
    settings = Settings(**SIZE, **RUNS[run])
    calls = []
    ask = Denoiser._ask
    monkeypatch.setattr(Denoiser, "_ask", lambda self, *x: (calls.append(x[0]), ask(self, *x))[1])
    whole = pipe.generate_latents(settings)
    total = len(calls)

    def cut(*_):
        if len(calls) == total - 1:
            raise Cut

    del calls[:]
    with pytest.raises(Cut):
        pipe.generate_latents(settings, replay=Replay(tmp_path / "run", {"a": 1}, resume=False), callback=cut)
    done = len(calls)
    del calls[:]
    replay = Replay(tmp_path / "run", {"a": 1}, resume=True)
    assert replay.num_calls == done
    again = pipe.generate_latents(settings, replay=replay)
    assert len(calls) == total - done == 1
    np.testing.assert_array_equal(again.video, whole.video)
    np.testing.assert_array_equal(again.audio, whole.audio)
    replay.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_that_was_cut_off_is_asked_for_again(tmp_path):
    stage = Replay(tmp_path / "run", {}, resume=False).stage("stage1")
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    stage.keep(0, Estimates(Pair(array, None), Pair(array + 1, None)))
    found = stage.recall(0)
    assert found is not None
    np.testing.assert_array_equal(found.held.video, array + 1)
    assert found.held.audio is None
    path = next((tmp_path / "run").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert stage.recall(0) is None
    assert stage.recall(1) is None


def test_another_run_is_not_gone_on_with(tmp_path):
    with pytest.raises(ReplayError, match="there is no unfinished run"):
        Replay(tmp_path / "run", {"seed": 1}, resume=True)
    Replay(tmp_path / "run", {"seed": 1, "files": ["a"]}, resume=False).stage("s").keep(
        0, Estimates(Pair(np.zeros((1, 1, 1)), None), Pair(None, None))
    )
    with pytest.raises(ReplayError, match="seed differ"):
        Replay(tmp_path / "run", {"seed": 2, "files": ["a"]}, resume=True)
    assert Replay(tmp_path / "run", {"seed": 1, "files": ["a"]}, resume=True).num_calls == 1
    assert Replay(tmp_path / "run", {"seed": 2, "files": ["a"]}, resume=False).num_calls == 0
