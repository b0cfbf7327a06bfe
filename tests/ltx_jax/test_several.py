"""Many clips of one call: which they are, and that one model load and one compilation make all of them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import generate
from ltx_jax import Settings
from ltx_jax.residency import Residency
from ltx_jax.settings_json import PATHS, settings_from
from ltx_jax.several import parse_seeds, read_prompts, tasks_of


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("1-4") == (1, 2, 3, 4)
    assert parse_seeds("7") == (7,)
    assert parse_seeds("1, 3,10-12") == (1, 3, 10, 11, 12)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-2", "1;2", "1-99999"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(ValueError, match="as 1-8 or 1,3,10-12"):
        parse_seeds(text)
    with pytest.raises(ValueError, match="there twice"):
        parse_seeds("1-3,2")


def test_prompts_are_lines_or_objects(tmp_path):
    base = Settings(num_frames=9, fps=12.0)
    (tmp_path / "prompts.txt").write_text("a cat\n\n# not this\n  a dog with a hat \n")
    assert [s.prompt for s in read_prompts(tmp_path / "prompts.txt", base)] == ["a cat", "a dog with a hat"]
    entries = ["a cat", {"prompt": "a dog", "seed": 3, "fps": 8, "image": ["x.png@-1"], "audio": "x.wav"}]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    cat, dog = read_prompts(tmp_path / "prompts.json", base)
    assert (cat.prompt, cat.fps, cat.num_frames) == ("a cat", 12.0, 9)
    assert (dog.seed, dog.fps, dog.image, dog.num_frames) == (3, 8.0, ("x.png@-1",), 9)
    assert dog.audio is not None
    assert dog.audio.name == "x.wav"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no prompts"),
        ('{"prompt": "a"}', "has no prompts"),
        ("[1]", "entry 1 of .* must be a prompt"),
        ('["a", {"prompts": "b"}]', "entry 2 of .*no setting prompts"),
        ('[{"seed": "3"}]', "seed must be a whole number, got '3'"),
        ('[{"fps": true}]', "fps must be a number or null"),
        ('[{"pipeline": "best"}]', "pipeline must be one of distilled"),
        ('["a"', "cannot be read"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.json", Settings())
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt", Settings())


def test_settings_come_back_from_json():
    from dataclasses import asdict, replace

    settings = Settings(prompt="x", fps=24.0, image=("a.png",), stg_blocks=(1, 2), sigmas=(1.0, 0.0), pipeline="hq")
    assert settings_from(json.loads(json.dumps(asdict(settings))), Settings()) == settings
    assert set(PATHS) == {"audio", "video", "reference", "latents", "noise"}
    assert settings_from({}, settings) == replace(settings)


def test_clips_are_named_after_prompt_and_seed(tmp_path):
    prompts = [Settings(prompt=str(number), seed=5) for number in range(11)]
    names = [task.output.name for task in tasks_of(prompts, None, tmp_path / "clip.mp4")]
    assert names[0] == "clip-01-seed5.mp4"
    assert names[-1] == "clip-11-seed5.mp4"
    names = [task.output.name for task in tasks_of(prompts[:1], (1, 2), tmp_path / "clip.mp4")]
    assert names == ["clip-seed1.mp4", "clip-seed2.mp4"]
    with pytest.raises(ValueError, match="make 1100 clips"):
        tasks_of(prompts, tuple(range(100)), tmp_path / "clip.mp4")


def test_many_clips_share_one_load_and_one_compilation(mini_checkpoint, tmp_path, monkeypatch, capsys):
    """Two prompts with two seeds; then, one of them lost, only that one again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    loaded, load = [], Residency._load

    def counted(self, component):
        loaded.append(component)
        return load(self, component)

    monkeypatch.setattr(Residency, "_load", counted)
    words = ["--checkpoint", mini_checkpoint, "--prompts", "prompts.txt", "--seeds", "1-2", "--output", "all.mp4"]
    words += ["--width", 64, "--height", 64, "--num-frames", 9, "--sigmas", 1, 0.5, 0, "--no-keep-prompts"]
    words = [str(word) for word in words]
    assert generate.main(words) == 0
    assert sorted(loaded) == sorted(set(loaded))
    clips = [f"all-{prompt}-seed{seed}" for prompt in (1, 2) for seed in (1, 2)]
    expected = sorted([f"{name}.{kind}" for name in clips for kind in ("mp4", "json")] + ["all.png", "prompts.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    with Image.open("all.png") as sheet:
        assert sheet.width == 4 * 64
        assert sheet.height == 4 * (64 + 24)
    contents = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in clips}
    assert len(set(contents.values())) == 4
    # The same clip as one of its own.
    alone = [*words[:2], "--from", "all-2-seed1.json", "--output", "alone.mp4"]
    assert generate.main(alone) == 0
    assert (tmp_path / "alone.mp4").read_bytes() == contents["all-2-seed1"]

    sheet = np.asarray(Image.open("all.png"))
    (tmp_path / "all-1-seed2.mp4").unlink()
    capsys.readouterr()
    assert generate.main([*words, "--resume"]) == 0
    assert "3 of 4 clips are there already" in capsys.readouterr().err
    assert {name: (tmp_path / f"{name}.mp4").read_bytes() for name in clips} == contents
    again = np.asarray(Image.open("all.png"))
    assert again.shape == sheet.shape


def test_another_prompt_or_seed_compiles_nothing(mini_checkpoint):
    from ltx_jax import load_pipeline

    pipe = load_pipeline(mini_checkpoint)
    size = {"width": 64, "height": 64, "num_frames": 9, "sigmas": (1.0, 0.5, 0.0)}
    pipe(prompt="a cat", **size, seed=1)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    pipe(prompt="a dog that is longer", **size, seed=2)
    assert compiled == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1-2", "--save-latents", "x.safetensors"], "it is for one clip"),
        (["--prompts", "prompts.txt", "--prompt", "a"], "leave out --prompt"),
        (["--prompts", "missing.txt"], "cannot be read"),
        (["--seeds", "2-1"], "rising ranges"),
    ],
)
def test_calls_for_many_clips_that_cannot_be_are_refused(
    mini_checkpoint, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert generate.main(["--checkpoint", str(mini_checkpoint), *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
