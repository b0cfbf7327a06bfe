"""docs/modes.md: each of its commands, as it stands there, at the size that stands there; and docs/training.md."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro
from PIL import Image

import finetune
import generate
from ltx_jax.media import describe
from ltx_jax.training.flow import FlowSettings

WATCHED = {"heron.mp4": {"heron.png": 2}, "longer.mp4": {"longer.png": 3}}
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/modes.md").read_text()


def commands() -> list[list[str]]:
    variables = dict(re.findall(r'^(\w+)="?([^"\n]+)"?$', PAGE, re.MULTILINE))
    found = re.findall(r"`python generate\.py ([^`]+)`", PAGE)
    for name, value in variables.items():
        found = [line.replace(f"${name}", value) for line in found]
    return [shlex.split(line) for line in found]


# In a process of its own: as a user runs them, without the checks of types that tests of the library run under.
RUN_ALL = """
import contextlib, io, json, sys
import generate
results = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        results.append((generate.main(words), said.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(mini_checkpoint, tmp_path_factory):
    """As a user's folder looks after `scripts/demo` and all commands of the page."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "outputs").mkdir()
    (folder / "outputs/mini-checkpoint").symlink_to(mini_checkpoint)
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each command returned and said, by its words."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", RUN_ALL, json.dumps(commands())]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(map(tuple, commands()), json.loads(done.stdout.splitlines()[-1]), strict=True))


def name_of(words: list[str]) -> str:
    return words[-1] if words[-1] != "--resume" else "resume"


@pytest.mark.parametrize("words", commands(), ids=name_of)
def test_every_command_asks_for_what_can_be(words):
    """Its flags exist and go together; what it does is tested mode by mode, and by the slow test below."""
    if "--from" in words:
        words = [word for word in words if word not in ("--from", "small.json", "heron.json")]
    arguments, _ = generate.parse_arguments(words)
    settings = arguments.settings
    if "--refine" in words and settings.video is None:
        settings = replace(settings, latents=Path("small.safetensors"))
    settings.check()


@pytest.mark.slow
@pytest.mark.parametrize("words", commands(), ids=name_of)
def test_every_command_of_the_page_runs(folder, results, monkeypatch, words):
    monkeypatch.chdir(folder)
    status, said = results[tuple(words)]
    assert status == 0, said
    assert not list(folder.glob(".*"))
    output = Path(words[words.index("--output") + 1])
    if "--preview" in words:
        assert output.with_suffix(".png").is_file()
    if "--seeds" in words:
        assert output.with_suffix(".png").is_file()
        output = output.with_name(f"{output.stem}-seed1{output.suffix}")
    for watched, num_frames in WATCHED.get(output.name, {}).items():
        with Image.open(watched) as animation:
            assert animation.n_frames == num_frames  # one a latent frame
    facts = describe(output)
    assert facts["sample_rate_hz"] == 48_000
    expected = {
        "large.mp4": (128, 128, 9),
        "larger.mp4": (128, 128, 17),
        "fine.mp4": (128, 128, 9),
        "full.mp4": (64, 64, 9),
        "small.mp4": (32, 32, 9),
        "portrait.mp4": (64, 128, 9),
        "longer.mp4": (64, 64, 21),
        "before.mp4": (64, 64, 16),
    }
    size = None if output.suffix == ".wav" else (facts["width"], facts["height"], facts["num_frames"])
    assert size == (None if output.suffix == ".wav" else expected.get(output.name, (64, 64, 9)))


def test_every_mode_flag_is_on_the_page():
    """A new mode must be shown. Left out: sizes, guidance scales and what says how a run is carried out."""
    from ltx_jax import Settings

    tuning = re.compile(r"(video|audio)_(cfg|stg|modality|rescale|skip)|sigmas|stg_blocks|_strength|_attention|_crf")
    plain = {"prompt", "width", "height", "num_frames", "fps", "seed", "negative_prompt", "noise", "sound_only"}
    names = {field.name for field in fields(Settings)} - plain
    missing = [n for n in names if not tuning.search(n) and f"--{n.replace('_', '-')}" not in PAGE]
    assert missing == []


def test_the_commands_of_the_page_on_training_are_understood():
    """Flags of both commands exist, and the settings it names are there."""
    page = (ROOT / "docs/training.md").read_text()
    lines = re.findall(r"^python (\w+)\.py ((?:[^\n]*\\\n)*[^\n]*)", page, re.MULTILINE)
    assert [name for name, _ in lines] == ["finetune", "generate"] * 2
    for name, line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        if name == "generate":
            generate.parse_arguments(words)
        else:
            assert tyro.cli(finetune.Arguments, args=words).num_frames % 8 == 1
    for flag in re.findall(r"--flow\.([\w-]+)", page):
        assert hasattr(FlowSettings(), flag.replace("-", "_"))
    for module in re.findall(r"`(training/\w+\.py)`", page):
        assert (ROOT / "ltx_jax" / module).is_file()


@pytest.mark.parametrize("page", ["docs/quality.md", "docs/training.md", "release/README.md", "README.md"])
def test_what_a_page_links_to_is_there(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
