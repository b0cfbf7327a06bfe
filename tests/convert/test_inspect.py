"""What `inspect` tells."""

import json
from pathlib import Path

from convert import inspect
from convert.__main__ import main
from convert.report import group_missing
from scripts.tiny import build

RELEASE = Path(__file__).parents[2] / "release"
BLOCK = "model.diffusion_model.transformer_blocks."


def test_a_package_is_described(package, capsys):
    assert main(["inspect", str(package)]) == 0
    text = capsys.readouterr().out
    assert "59 matrices, layout V5, packing M, 5 bits in blocks of 128: 5.130 bits a weight" in text
    assert "codebook       B: energy 1.001" in text
    assert "56 of 56 block linears quantised (2 blocks of 28)" in text
    assert "complete       every parameter" in text


def test_json_says_the_same(package, capsys):
    assert main(["inspect", str(package), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quantized"][0]["codebook"] == "B"
    assert facts["missing"] == []
    assert (facts["num_blocks"], facts["linears_per_block"]) == (2, 28)


def test_an_incomplete_package_is_still_described(package, codes):
    codes[3].unlink()
    report = inspect(package)
    assert not report.complete
    assert report.num_missing == 9
    assert report.quantized_block_linears == 47


def test_a_plain_checkpoint_is_described(ltx_dir):
    report = inspect(ltx_dir / "checkpoint.safetensors")
    assert report.complete
    assert (report.kind, report.quantized, report.plain_block_linears) == ("plain checkpoint", (), 56)


def test_a_missing_source_is_an_error(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


def test_missing_names_become_few_lines():
    linears = [f"attn1.to_{x}.weight" for x in "qkv"]
    names = [f"{BLOCK}{n}.{name}" for n in (3, 4, 5, 9) for name in linears]
    names += [f"{BLOCK}9.scale_shift_table", "vae.decoder.conv_in.conv.weight", "vae.decoder.conv_in.conv.bias"]
    assert group_missing(names, linears_per_block=3) == [
        "transformer_blocks 3-5: all 3 linears (3 blocks, 9 tensors)",
        "transformer_blocks 9: all 3 linears and scale_shift_table (1 blocks, 4 tensors)",
        "vae: 2 tensors: vae.decoder.conv_in.conv.bias, vae.decoder.conv_in.conv.weight",
    ]


def test_a_packed_projection_of_another_model_asks_for_its_text_encoder(capsys):
    """How many hidden states it reads is nowhere in the package: without a text encoder LTX-2.3's 49 are assumed."""
    assert main(["inspect", str(RELEASE / build.PACKAGE)]) == 2
    assert "taken to read 49 hidden states" in capsys.readouterr().err
    assert main(["inspect", str(RELEASE / build.PACKAGE), "--gemma", str(RELEASE / build.GEMMA)]) == 0
