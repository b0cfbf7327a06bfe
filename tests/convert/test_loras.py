"""What `inspect` tells of LoRA files, and that `convert` sends them elsewhere."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert.loras as loras_module
from convert import ConvertError, convert, inspect
from convert.__main__ import main
from convert.files import OnlyLoras, open_source
from convert.loras import describe_loras, lora_text
from hlwq_jax import TensorFile
from tests.web import serve

BLOCK = "diffusion_model.transformer_blocks.0."
KINDS = {
    *(
        f"transformer_blocks.*.{attention}.{name}"
        for attention in ("attn1", "audio_attn1")
        for name in ("to_q", "to_k")
    ),
    *(
        f"transformer_blocks.*.{attention}.{name}"
        for attention in ("attn1", "audio_attn1")
        for name in ("to_v", "to_out.0")
    ),
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.audio_to_video_attn.to_q",
    "transformer_blocks.*.video_to_audio_attn.to_q",
}


@pytest.fixture
def lora(mini_release, tmp_path):
    """A copy of the release's LoRA that a test may change."""
    return shutil.copy(mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors", tmp_path / "lora.safetensors")


@pytest.fixture
def mini_model(monkeypatch, mini_release):
    """The model that a LoRA alone is held against: the miniature one."""
    kept = mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    monkeypatch.setattr(loras_module, "LTX_2_3", json.loads(TensorFile(kept).metadata["config"]))


def change(path, tensors=None, metadata=None, without=()):
    kept = {name: tensor for name, tensor in load_file(path).items() if not any(word in name for word in without)}
    save_file(kept | (tensors or {}), path, metadata=metadata)


def pair(name: str, rank: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kind = ml_dtypes.bfloat16
    return {
        f"{name}.lora_A.weight": np.zeros((rank, inputs), kind),
        f"{name}.lora_B.weight": np.zeros((outputs, rank), kind),
    }


def test_a_lora_that_fits_is_described(lora, mini_model, capsys):
    assert main(["inspect", str(lora), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["loras"]
    assert (facts["num_pairs"], facts["ranks"], facts["dtypes"]) == (24, {"8": 24}, {"bfloat16": 48})
    assert facts["matched"] == dict.fromkeys(sorted(KINDS), 2)
    assert not any(facts[name] for name in ("unmatched", "misfits", "foreign", "broken"))
    assert main(["inspect", str(lora.parent)]) == 0  # a folder of LoRAs
    text = capsys.readouterr().out
    assert "pairs          24 of rank 8, bfloat16" in text
    assert "adapts         24 linears of LTX-2.3" in text
    assert text.rstrip().endswith("give it to generate.py, with --lora FILE:STRENGTH")


def test_what_does_not_fit_is_named(lora, mini_model):
    change(
        lora,
        pair(f"{BLOCK}attn1.to_q", 4, 512, 256)
        | pair(f"{BLOCK}attn9.to_q", 8, 256, 256)
        | {f"{BLOCK}attn1.to_q.alpha": np.zeros(1, np.float32)},
        {"reference_downscale_factor": "2", "ss_tags": "x" * 1000},
        without=["blocks.1.attn1.to_k.lora_B"],
    )
    with pytest.raises(OnlyLoras) as found:
        open_source(lora)
    (facts,) = describe_loras(found.value.loras)
    assert facts.ranks == {8: 23, 4: 1}
    assert facts.misfits == ("transformer_blocks.0.attn1.to_q is [256, 512], that of LTX-2.3 [256, 256]",)
    assert facts.unmatched == {"transformer_blocks.*.attn9.to_q": 1}
    assert facts.broken == ("transformer_blocks.1.attn1.to_k",)
    assert facts.foreign == (f"{BLOCK}attn1.to_q.alpha",)
    lines = lora_text(facts).splitlines()
    assert "pairs          24 of rank 4 (1), 8 (23), bfloat16, float32" in lines
    assert "reference      reference_downscale_factor 2" in lines
    assert "NOT IN MODEL   transformer_blocks.*.attn9.to_q (1)" in lines
    assert lines[-1] == "use            generate.py refuses it for LTX-2.3"
    assert max(map(len, lines)) < 120


def test_a_lora_beside_a_package_is_held_against_its_model(package, lora, capsys):
    shutil.copy(lora, package / "lora.safetensors")
    report = inspect(package)
    assert report.complete
    (facts,) = report.loras
    assert (facts.fits, facts.model, sum(facts.matched.values())) == (True, "the model beside it", 24)
    assert str(package / "lora.safetensors") in report.ignored


def test_a_lora_is_not_converted(lora, tmp_path, capsys):
    with pytest.raises(
        ConvertError, match=r"nothing to convert in a LoRA: give .*lora.safetensors to generate.py, with"
    ):
        convert(lora, tmp_path / "out")
    assert main([str(lora), str(tmp_path / "out")]) == 2
    assert "--lora FILE:STRENGTH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_programs_loras_are_known_as_such(tmp_path, mini_model):
    names = [f"lora_unet_transformer_blocks_0_attn1_to_q.lora_{half}.weight" for half in ("down", "up")]
    save_file({name: np.zeros((4, 4), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(OnlyLoras) as found:
        open_source(tmp_path / "x.safetensors")
    (facts,) = describe_loras(found.value.loras)
    assert (facts.num_pairs, set(facts.foreign), facts.fits) == (0, set(names), False)
    assert "generate.py refuses it" in lora_text(facts)


def test_a_lora_at_an_address_is_read_by_its_header_only(lora, mini_model, capsys):
    with serve() as web:
        web.files["/lora.safetensors"] = lora.read_bytes()
        assert main(["inspect", f"{web.address}/lora.safetensors"]) == 0
        assert web.sent < 2**15 < lora.stat().st_size / 4
    text = capsys.readouterr().out
    assert "adapts         24 linears" in text
    assert "fetched        " in text
    assert "of 207.1 kB, in 1 requests" in text
