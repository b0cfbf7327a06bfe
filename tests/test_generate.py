"""The command line: a clip, its .json, the same clip again, and errors that say what to do."""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import generate
from ltx_jax.media import describe
from ltx_jax.replay import StageReplay

SIZE = ["--width", "96", "--height", "64", "--num-frames", "17"]


@pytest.fixture(scope="module")
def made(mini_checkpoint, mini_release, tmp_path_factory):
    """One clip made with most flags: an image, a LoRA, given noise, latents saved."""
    folder = tmp_path_factory.mktemp("clips")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 120, 3), np.uint8)).save(folder / "first.png")
    noise = mini_release / "reference/gen_a_distilled.safetensors"
    lora = mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors"
    arguments = ["--checkpoint", mini_checkpoint, "--prompt", "a cat", "--output", folder / "clip.mp4", *SIZE]
    arguments += ["--image", folder / "first.png", "--noise", noise, "--lora", f"{lora}:0.5"]
    arguments += ["--save-latents", folder / "latents.safetensors"]
    assert generate.main([str(word) for word in arguments]) == 0
    return folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_clip_plays(made):
    facts = describe(made / "clip.mp4")
    expected = {
        "video_codec": "h264",
        "audio_codec": "aac",
        "num_frames": 17,
        "width": 96,
        "height": 64,
        "fps": 24.0,
        "sample_rate_hz": 48_000,
        "audio_channels": 2,
    }
    assert {name: facts[name] for name in expected} == expected
    assert abs(facts["num_samples"] / 48_000 - 17 / 24) < 0.05  # AAC packets and the latent grid of sound


def test_latents_are_saved_in_the_reference_axes(made):
    latents = load_file(made / "latents.safetensors")
    assert {name: array.shape for name, array in latents.items()} == {
        "out.video_latent": (1, 16, 3, 2, 3),
        "out.audio_latent": (1, 2, 18, 16),
    }


def test_the_settings_are_written_beside_the_clip(made):
    content = json.loads((made / "clip.json").read_text())
    assert content["settings"]["prompt"] == "a cat"
    assert content["settings"]["seed"] == 10
    assert len(content["files"]) == 3


def test_a_clip_is_repeated_bit_for_bit(made):
    arguments = ["--from", made / "clip.json", "--output", made / "again.mp4"]
    arguments += ["--save-latents", made / "again.safetensors"]
    assert generate.main([str(word) for word in arguments]) == 0
    assert digest(made / "again.mp4") == digest(made / "clip.mp4")
    assert digest(made / "again.safetensors") == digest(made / "latents.safetensors")


def test_no_unfinished_files_are_left(made):
    assert not [path for path in made.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "width must be a multiple of 32, for one stage|try 96 or 128"),
        (["--num-frames", "20"], "try 17 or 25"),
        (["--pipeline", "two-stage", "--width", "96"], "64 for two stages"),
        (["--output", "nowhere/clip.mp4"], "does not exist"),
        (["--output", "clip.avi"], "must end in .mp4"),
        (["--image", "missing.png"], "no image at"),
        (["--noise", "missing.safetensors"], "cannot be read"),
        (["--lora", "missing.safetensors:0.5"], "no LoRA file"),
        (["--steps", "5"], "8 fixed steps"),
        (["--checkpoint", "nowhere"], "no checkpoint folder"),
    ],
)
def test_bad_arguments_say_what_to_do(mini_checkpoint, tmp_path, monkeypatch, capsys, arguments, message):

    monkeypatch.chdir(tmp_path)
    defaults = ["--checkpoint", str(mini_checkpoint), "--output", "clip.mp4", *SIZE]
    assert generate.main([*defaults, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_repeat_add_up():
    arguments, _ = generate.parse_arguments(["--checkpoint", "x", "--lora", "a:0.5", "--lora", "b"])
    assert arguments.lora == ("a:0.5", "b")


def test_a_foreign_json_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert generate.main(["--from", str(tmp_path / "other.json")]) == 2
    assert "not written beside a clip" in capsys.readouterr().err


def run(*words) -> int:
    return generate.main([str(word) for word in words])


def test_modes_go_together_on_the_command_line(mini_checkpoint, made, tmp_path, capsys):
    """Keyframes, a given sound, an enhanced prompt, an animation to watch, another shape."""
    image = made / "first.png"
    words = ["--checkpoint", mini_checkpoint, "--prompt", "a cat", "--output", tmp_path / "clip.mp4", "--enhance"]
    words += [
        "--image",
        image,
        "--image",
        f"{image}@-1:0.8",
        "--audio",
        made / "clip.mp4",
        "--sigmas",
        "1.0",
        "0.5",
        "0",
    ]
    words += ["--aspect", "3:2", "--megapixels", "0.006", "--num-frames", "17", "--watch", tmp_path / "now.png"]
    assert run(*words) == 0
    facts = describe(tmp_path / "clip.mp4")
    assert (facts["width"], facts["height"], facts["num_frames"]) == (96, 64, 17)
    with Image.open(tmp_path / "now.png") as watched:
        assert watched.n_frames == 3  # one a latent frame
    said = capsys.readouterr().err
    assert "prompt:" in said or "wrote nothing" in said
    settings = json.loads((tmp_path / "clip.json").read_text())
    assert settings["settings"]["image"] == [f"{image.resolve()}@0", f"{image.resolve()}@-1:0.8"]
    assert len(settings["files"]) == 2
    assert run("--from", tmp_path / "clip.json", "--output", tmp_path / "again.mp4") == 0
    assert digest(tmp_path / "again.mp4") == digest(tmp_path / "clip.mp4")


def test_a_run_that_was_stopped_goes_on(mini_checkpoint, tmp_path, monkeypatch, capsys):
    words = ["--checkpoint", mini_checkpoint, "--prompt", "a cat", *SIZE, "--sigmas", "1.0", "0.6", "0.3", "0"]
    assert run(*words, "--output", tmp_path / "whole.mp4") == 0
    with monkeypatch.context() as patched:
        seen = []

        def stop(self, call, estimates):
            keep(self, call, estimates)
            seen.append(call)
            if len(seen) == 2:
                raise KeyboardInterrupt

        keep = StageReplay.keep
        patched.setattr(StageReplay, "keep", stop)
        assert run(*words, "--output", tmp_path / "clip.mp4") == 130
    assert not (tmp_path / "clip.mp4").exists()
    assert run(*words, "--output", tmp_path / "clip.mp4", "--seed", "11", "--resume") == 2
    assert "settings differ" in capsys.readouterr().err
    assert run(*words, "--output", tmp_path / "clip.mp4", "--resume") == 0
    assert "goes on: 2 model calls are there" in capsys.readouterr().err
    assert digest(tmp_path / "clip.mp4") == digest(tmp_path / "whole.mp4")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "x.png@99"], "no image at"),
        (["--audio", "missing.wav"], "no file at"),
        (["--video", "missing.mp4", "--retake", "0:1"], "no file at"),
        (["--video", "clip.mp4", "--upscale", "2"], "no file at"),
        (["--retake", "0:1"], "give it too, with --video"),
        (["--resume"], "no unfinished run"),
        (["--watch", "now.mp4"], "png"),
        (["--sound-only"], "must end in .wav"),
        (["--reference", "x.mp4"], "no file at"),
        (["--distilled-lora", "x.safetensors"], "two stages"),
    ],
)
def test_modes_that_cannot_be_say_what_to_do(mini_checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("--checkpoint", mini_checkpoint, "--output", "clip.mp4", *SIZE, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_what_a_clip_is_made_from_is_not_written_over(mini_checkpoint, made, capsys):
    before = digest(made / "clip.mp4")
    words = ["--checkpoint", mini_checkpoint, "--video", made / "clip.mp4", "--upscale", 2]
    assert run(*words, "--output", made / "clip.mp4") == 2
    assert "give it another name" in capsys.readouterr().err
    assert digest(made / "clip.mp4") == before
