"""The measures of quality: exact on what is known, and the shipped release held to what it promises."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import convert
from ltx_jax import load_pipeline
from ltx_jax.lora import Lora
from ltx_jax.media import write_mp4
from scripts import evaluate
from scripts.quality import captions, coding, measures, tables
from scripts.quality.compare import compare, walk
from scripts.tiny import build, draw, release, world

RELEASE = Path(__file__).parents[2] / "release"
LORAS = RELEASE / build.LORAS


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped release, converted as scripts/demo converts it."""
    dest = tmp_path_factory.mktemp("checkpoint") / "tiny"
    convert(RELEASE / build.PACKAGE, dest, gemma=RELEASE / build.GEMMA, gemma_bits=16)
    return dest


def no_progress() -> None:
    pass


# ---------------------------------------------------------------------- measures


def frames(seed: int = 0) -> np.ndarray:
    toy = world.sample("train", 0, seed)
    return world.render(toy, width=64, height=48, num_frames=3, fps=1.5)


def test_frames_are_as_similar_as_they_are():
    a, b = frames(0), frames(1)
    assert measures.ssim(a, a) == pytest.approx(1)
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    assert measures.ssim(a, b) < measures.ssim(a, noisy) < 1
    assert measures.psnr_db(a, a) > 100
    # Noise of deviation 12 is 20 log10(255 / 12) = 26.5 dB, but for what is clipped.
    assert measures.psnr_db(a, noisy) == pytest.approx(26.5, abs=1)
    with pytest.raises(ValueError, match="frames of one size"):
        measures.ssim(a, a[:, :20])


def test_sounds_differ_by_what_they_are_louder():
    config = evaluate.release.configs().audio_vae
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.1, (16000, 2)).astype(np.float32)
    assert measures.mel_distance_db(wave, wave, 16000, config) == 0
    # Half the amplitude is 6.02 dB less everywhere.
    assert measures.mel_distance_db(wave, wave / 2, 16000, config) == pytest.approx(6.02, abs=0.05)
    assert measures.mel_distance_db(wave, np.zeros_like(wave), 16000, config) > 20


# ---------------------------------------------------------------------- captions


def test_drawn_clips_are_all_right_and_a_wrong_caption_is_found(tmp_path, capsys):
    draw.main(tmp_path / "clips", split="test", count=6, scale=2, paraphrase=False)
    evaluate.Clips(folder=tmp_path / "clips", output=tmp_path / "found.json").run()
    assert "| clips | 6 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in capsys.readouterr().out
    caption = next(iter(sorted((tmp_path / "clips").glob("*.txt"))))
    toy = world.parse(caption.read_text())
    other = replace(toy, colour="red" if toy.colour != "red" else "blue", sound="tone")
    caption.write_text(other.caption)
    found = captions.summary(list(captions.judged_files(tmp_path / "clips")))
    assert found["colour"] == pytest.approx(5 / 6)
    assert found["shape"] == 1
    rows = json.loads((tmp_path / "found.json").read_text())["clips"]
    assert len(rows) == 6
    assert all(all(row["right"].values()) for row in rows)


def test_what_cannot_be_judged_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no clips"):
        list(captions.judged_files(tmp_path))
    draw.main(tmp_path, count=1, paraphrase=False)
    next(tmp_path.glob("*-0000.txt")).write_text("a heron lands")
    with pytest.raises(ValueError, match="is not a caption of the little world"):
        list(captions.judged_files(tmp_path))


def test_stability_counts_captions_not_clips():
    toys = [world.sample("test", 0, i) for i in range(3)]
    right = {0: (True, True), 1: (True, False), 2: (False, False)}
    found = [
        captions.Judged(toy=toys[i], seed=seed, verdict=_Verdict(good))  # type: ignore[arg-type]
        for i, goods in right.items()
        for seed, good in enumerate(goods)
    ]
    said = captions.stability(found)
    assert said == {"captions": 3, "always": pytest.approx(1 / 3), "never": pytest.approx(1 / 3)}


class _Verdict:
    def __init__(self, right: bool):
        self.right = right


# ---------------------------------------------------------------------- the release


def test_the_release_is_small_and_complete():
    files = [file for file in RELEASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert (RELEASE / "README.md").is_file()
    sidecar = json.loads((RELEASE / build.PACKAGE / "polar_config.json").read_text())
    assert sidecar["format"] == "hlwq"
    assert {layer["bits"] for layer in sidecar["layers"].values()} == {5}
    linears = [name for name in sidecar["layers"] if "transformer_blocks." in name]
    assert len(linears) == 28 * release.TRANSFORMER["num_layers"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    lora = LORAS / build.SHIPPED_LORAS["distilled"]
    return load_pipeline(tiny_checkpoint, loras=[Lora(lora)], keep_prompts=False)


def test_clips_of_held_out_captions_are_what_they_say(pipe):
    """Twelve clips of eight steps each; docs/quality.md has the shares of all 241 captions."""
    toys = captions.held_out("test", 12)
    assert not {toy.words for toy in toys} & set(world.combinations("train"))
    found = captions.summary(captions.judged(captions.maker(pipe), toys, 1, no_progress))
    # One of twelve may miss a word whose share is 95 %; of shapes, two.
    assert found["colour"] >= 11 / 12
    assert found["background"] >= 11 / 12
    assert found["motion"] >= 10 / 12
    assert found["sound"] >= 10 / 12
    assert found["shape"] >= 9 / 12


def test_autoencoders_keep_what_captions_say(pipe):
    toys = captions.held_out("test", 6)
    drawn = [coding.drawn(toy, pipe.configs.vocoder.sample_rate_hz) for toy in toys]
    lost = coding.losses(pipe, drawn, no_progress, toys)
    # docs/quality.md has the means over 60 clips; a plain background alone has 15 dB.
    assert lost["PSNR dB"] > 25
    assert lost["SSIM"] > 0.85
    assert lost["colour"] == lost["background"] == 1


def test_a_checkpoint_differs_from_itself_in_nothing(pipe):
    request = {
        "prompt": world.sample("test", 0, 0).caption, "seed": 1, "width": release.WIDTH, "height": release.HEIGHT,
        "num_frames": release.NUM_FRAMES, "fps": release.FPS,
    }  # fmt: skip
    path = walk(pipe, **request)
    assert len(path.sigmas) == 8
    same = compare(pipe, {"itself": pipe}, [request], no_progress).rows["itself"]
    assert same["velocity, first step"] == same["velocity, all steps"] == same["latents at the end"] == 0
    assert same["SSIM"] == pytest.approx(1)
    assert same["mel dB"] == 0


def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "clips", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    assert "holds no clips" in capsys.readouterr().err


def test_a_heart_is_a_heart_with_its_lora_alone(tiny_checkpoint, pipe):
    """What the released LoRA teaches; other shapes stay what they were, as docs/quality.md says of all captions."""
    toys = captions.held_out("test", 4, shapes=("heart",))
    loras = [Lora(LORAS / build.SHIPPED_LORAS["distilled"]), Lora(LORAS / build.SHIPPED_LORAS["heart"])]
    taught = load_pipeline(tiny_checkpoint, loras=loras, keep_prompts=False)
    hearts = captions.summary(captions.judged(captions.maker(taught), toys, 1, no_progress))["shape"]
    without = captions.summary(captions.judged(captions.maker(pipe), toys, 1, no_progress))["shape"]
    assert hearts >= 3 / 4
    assert without < hearts
    others = captions.held_out("test", 4)
    found = [captions.judged(captions.maker(each), others, 1, no_progress) for each in (taught, pipe)]
    assert [each.row()["right"] for each in found[0]] == [each.row()["right"] for each in found[1]]


# ---------------------------------------------------------------------- the page


def measurement(folder: Path, name: str, shape: float, motion: str = "spin") -> None:
    clips = [
        {"asked": {"motion": motion, "size": "small", "shape": "star"}, "right": {"shape": number < 4 * shape}}
        for number in range(4)
    ]
    row = {key: 1.0 for key in tables.SHARES.values()} | {"clips": 4, "shape": shape, "in_step": math.nan}
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "rows": {name: row}, "clips": clips}))


def test_tables_of_a_page_are_what_was_measured(tmp_path):
    folder, page = tmp_path / "quality", tmp_path / "page.md"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no measurements; scripts/tiny/evaluate\.sh RUN"):
        tables.fill(page, folder)
    for name, shape in (("dev-bf16", 0.75), ("dev-5-fitted", 0.5)):
        measurement(folder, name, shape)
    page.write_text("no place for tables")
    with pytest.raises(ValueError, match=r"no comment such as <!-- guided -->"):
        tables.fill(page, folder)

    page.write_text(
        "before\n\n<!-- guided -->\nold\n<!-- /guided -->\nafter\n<!-- bars --><!-- /bars -->\n<!-- bars -->\n"
    )
    evaluate.Tables(folder=folder, page=page).run()
    assert page.read_text() == (
        "before\n\n<!-- guided -->\n\n"
        "|  | clips | colour | shape | size | motion | direction | background | sound | all words | in step |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| BF16 | 4 | 100.0 | 75.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | - |\n"
        "| **5 bits, fitted: the release** | 4 | 100.0 | 50.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | - |\n\n"
        "<!-- /guided -->\nafter\n<!-- bars --><!-- /bars -->\n<!-- bars -->\n"
    )
    page.write_text("<!-- compare -->\nold\n<!-- /compare -->\n")
    with pytest.raises(ValueError, match=r"quality has no compare\.json; scripts/tiny/evaluate\.sh RUN"):
        tables.fill(page, folder)
    assert "old" in page.read_text()
    bars = tables.bars_table(tables.Measurements(folder))
    assert ["shape right", "≥ 85 %", "75.0 %", "-25.0"] in bars
    assert tables.motions_table(tables.Measurements(folder))[1:] == [
        ["guided, BF16", "3 of 4", "3 of 4"],
        ["guided, the release", "2 of 4", "2 of 4"],
    ]


def test_what_a_lora_changes_is_counted_both_ways(tmp_path):
    (tmp_path / "quality").mkdir()
    words = [(True, True), (True, False), (False, True), (True, False)]  # shapes without, and with the LoRA
    for names in tables.OTHERS.values():
        for name, column in zip(names, range(2), strict=True):
            clips = [{"right": dict.fromkeys(captions.WORDS, True) | {"shape": pair[column]}} for pair in words]
            (tmp_path / f"quality/{name}.json").write_text(json.dumps({"rows": {}, "clips": clips}))
    rows = {row[0]: row[1:] for row in tables.changes_table(tables.Measurements(tmp_path / "quality"))}
    assert rows["shape"] == rows["all words"] == ["2", "1"] * 2
    assert rows["colour"] == ["0", "0"] * 2


def test_clips_are_shown_below_each_other(tmp_path, monkeypatch, capsys):
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (9, 32, 48, 3))
    for name in ("without", "with-it"):
        write_mp4(tmp_path / f"{name}.mp4", np.ascontiguousarray(frames), fps=8.0)
    clips = [str(tmp_path / f"{name}.mp4") for name in ("without", "with-it")]
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "sheet", str(sheet), *clips, "--columns", "3"])
    evaluate.main()
    assert str(sheet) in capsys.readouterr().out
    picture = np.asarray(Image.open(sheet))
    assert picture.shape[1] == 3 * 48
    # Each row's last tile is the brightest: H.264 moves levels a little.
    assert np.sum(np.all(picture[:, -40:-8] > 240, axis=(1, 2))) >= 2 * 28


def test_the_page_of_the_release_has_every_table():
    page = (RELEASE.parent / "docs/quality.md").read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- /{name} -->") == 1, name
