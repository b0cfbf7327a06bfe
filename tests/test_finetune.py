"""finetune.py: a folder of clips to a LoRA that fits the checkpoint, or to all weights; what is wrong is said."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from convert import convert
from convert.official import write_official
from convert.tables import component_of
from finetune import Arguments, begin, finetune, main
from ltx_jax.checkpoint import Configs, Manifest
from ltx_jax.lora import read_lora
from ltx_jax.media import write_mp4
from ltx_jax.training.loop import read_metrics
from tests.convert.test_official import filled


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3)).astype(np.uint8)
    write_mp4(folder / "noise.mp4", frames, fps=8.0)
    (folder / "noise.txt").write_text("noise")
    return folder


def arguments(checkpoint: Path, clips: Path, run: Path, **changes) -> Arguments:
    settings = {"width": 32, "height": 32, "num_frames": 9, "steps": 2, "rank": 2, "save_every": 1}
    return Arguments(checkpoint=checkpoint, clips=clips, run=run, **(settings | changes))


def test_a_lora_is_learnt_and_fits(mini_checkpoint, clips, tmp_path, capsys):
    path = finetune(arguments(mini_checkpoint, clips, tmp_path / "run"))
    learnt = read_lora(path)
    names = Manifest.read(mini_checkpoint).linears_below("model.diffusion_model.", "transformer")
    assert set(learnt) <= set(names)
    # Ten attentions and feed-forwards a block of two: to_q, to_k, to_v and to_out of six, two linears of two.
    assert len(learnt) == 2 * (6 * 4 + 2 * 2)
    assert all(a.shape[0] == 2 for a, _ in learnt.values())
    assert any(np.any(np.asarray(b, np.float32)) for _, b in learnt.values())
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]
    other = arguments(mini_checkpoint, clips, tmp_path / "run", rank=3, keep=clips)
    with pytest.raises(ValueError, match=r"begun with other options: rank was 2, now 3; keep was None, now .*\. Give"):
        finetune(other)
    longer = arguments(
        mini_checkpoint, clips, tmp_path / "run", steps=3, learning_rate=1e-5, accumulate=1, save_every=3
    )
    begin(longer)  # as the trainer says where a loss is not finite
    path.unlink()
    again = read_lora(finetune(arguments(mini_checkpoint, clips, tmp_path / "run")))  # from the last snapshot
    for name, pair in learnt.items():
        for one, other in zip(pair, again[name], strict=True):
            np.testing.assert_array_equal(one, other)


def test_captions_need_a_text_encoder(ltx_dir, clips, tmp_path):
    convert(ltx_dir / "checkpoint.safetensors", tmp_path / "plain")
    with pytest.raises(ValueError, match="without a text encoder"):
        finetune(arguments(tmp_path / "plain", clips, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"full": True}, "packed weights are not trained"),
        ({"full": True, "keep": Path("kept")}, "--keep holds adapters to the model beneath them"),
        ({"keep": Path("nowhere")}, "nowhere holds no clips"),
        ({"keep": Path("kept"), "keep_weight": 0.0}, "weight of what is kept must be above 0"),
        ({"width": 40}, "width must be a multiple of 32"),
        ({"num_frames": 8}, "num_frames must be 8k \\+ 1"),
        ({"num_frames": 17}, "1 of 1 clips have fewer than 17 frames"),
        ({"clips": Path("nowhere")}, "nowhere holds no clips"),
        ({"targets": "to_q"}, r"no linear matches 'to_q'; there are \d+, such as"),
        ({"targets": "to_(q"}, "targets must be a regular expression"),
    ],
)
def test_what_is_wrong_is_said(mini_checkpoint, clips, tmp_path, changes, told):
    given = arguments(mini_checkpoint, clips, tmp_path / "run")
    with pytest.raises(ValueError, match=told):
        finetune(Arguments(**(vars(given) | changes)))


def test_the_command_line_says_it_in_one_line(mini_checkpoint, tmp_path, monkeypatch, capsys):
    said = ["finetune.py", "--checkpoint", str(mini_checkpoint), "--clips", str(tmp_path), "--run", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", [*said, "--width", "32", "--height", "32", "--num-frames", "9"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"finetune: {tmp_path} holds no clips")


def test_what_is_kept_is_read_from_a_folder_of_its_own(mini_checkpoint, clips, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    frames = np.random.default_rng(1).integers(0, 255, (9, 32, 32, 3)).astype(np.uint8)
    for name in ("one", "two"):
        write_mp4(kept / f"{name}.mp4", frames, fps=8.0)
        (kept / f"{name}.txt").write_text(f"noise {name}")
    given = arguments(mini_checkpoint, clips, tmp_path / "run", keep=kept, keep_weight=100.0, steps=4)
    assert all(np.any(np.asarray(b, np.float32)) for _, b in read_lora(finetune(given)).values())
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert lines[0]["kept_video"] < 1e-9  # adapters begin at zero
    assert lines[-1]["kept_video"] > 0
    assert {"video", "audio", "kept_audio"} <= set(lines[0])
    assert len(list((tmp_path / "run/encoded").glob("text-*"))) == 4  # three captions, and no text


@pytest.mark.slow
def test_all_weights_are_learnt_where_they_are_not_packed(mini_release, clips, tmp_path):
    release = mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    with safe_open(release, "numpy") as file:
        metadata = json.loads(file.metadata()["config"])
    gemma = mini_release / "gemma-3-mini"
    gemma_metadata = json.loads((gemma / "config.json").read_text())
    layers = gemma_metadata.get("text_config", gemma_metadata)["num_hidden_layers"]
    configs = Configs.from_metadata(metadata, num_hidden_states=layers + 1)
    official = tmp_path / "official.safetensors"
    write_official(official, {part: filled(configs, part) for part in configs.components}, metadata)
    convert(official, tmp_path / "plain", gemma=gemma, gemma_bits=16)

    path = finetune(arguments(tmp_path / "plain", clips, tmp_path / "run", full=True))
    with safe_open(path, "numpy") as file, safe_open(official, "numpy") as source:
        names = set(file.keys())
        assert names == {name for name in source.keys() if component_of(name) == "transformer"}  # noqa: SIM118
        moved = [not np.array_equal(file.get_tensor(name), source.get_tensor(name)) for name in names]
    assert np.mean(moved) > 0.3  # steps of 2e-4 are below the precision of large weights
