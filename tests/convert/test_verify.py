"""Whether a checkpoint is what its conversion wrote, and how far it is from the original."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import ConvertError
from convert.__main__ import main
from convert.compare import FAR, Distance, compare, plot
from convert.journal import INVENTORY
from convert.verify import verify
from hlwq_jax import TensorFile, open_folder
from ltx_jax.checkpoint import MANIFEST

from .conftest import PACKAGE

BLOCK = "model.diffusion_model.transformer_blocks."


@pytest.fixture
def copy(mini_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(mini_checkpoint, tmp_path / "copy"))


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_is_what_was_written(mini_checkpoint, capsys):
    found = verify(mini_checkpoint)
    assert found.ok
    sizes = sum(path.stat().st_size for path in mini_checkpoint.rglob("c*") if path.name == "c" or ".0" in path.name)
    assert found.num_bytes == sizes
    assert main(["verify", str(mini_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"ok": True} == json.loads(json.dumps(vars(found))) | {"ok": True}


def test_everything_that_is_not_as_it_was_is_listed(copy, capsys):
    block = copy / "transformer/blocks.001"
    flip(block / "blocks.1.video.ff.proj_in.lo/c.0.0", 77)
    flip(block / "blocks.1.audio.self_attn.to_q.bias/zarr.json", 3)
    shutil.rmtree(block / "blocks.1.video.self_attn.to_q.norms")
    (block / "blocks.1.video.self_attn.to_k.lo/c.0.0").unlink()
    (block / "blocks.1.video.self_attn.to_v.lo/c.0.1").write_bytes(b"more")
    with open(block / "blocks.1.video.self_attn.to_v.norms/c.0.0", "ab") as piece:
        piece.write(b"\0")
    flip(copy / "transformer/blocks.000/_METADATA", 9)
    shutil.rmtree(copy / "video_vae/shared")
    flip(copy / "tokenizer/tokenizer.json", 5)
    (copy / "tokenizer/tokenizer_config.json").unlink()
    (copy / "notes.txt").write_text("mine")
    (copy / "old/blocks.000").mkdir(parents=True)
    found = {fault.item: fault.what.partition(":")[0].partition(",")[0] for fault in verify(copy).faults}
    assert found == {
        "transformer/blocks.001/blocks.1.video.ff.proj_in.lo": "damaged",
        "transformer/blocks.001/blocks.1.audio.self_attn.to_q.bias/zarr.json": "damaged",
        "transformer/blocks.001/blocks.1.video.self_attn.to_q.norms": "missing",
        "transformer/blocks.001/blocks.1.video.self_attn.to_k.lo": "missing c.0.0",
        "transformer/blocks.001/blocks.1.video.self_attn.to_v.lo/c.0.1": "extra",
        "transformer/blocks.001/blocks.1.video.self_attn.to_v.norms": "damaged",
        "transformer/blocks.000/_METADATA": "damaged",
        "video_vae/shared": "missing",
        "tokenizer/tokenizer.json": "damaged",
        "tokenizer/tokenizer_config.json": "missing",
        "notes.txt": "extra",
        "old": "extra",
    }
    assert main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "12 of " in out
    assert "transformer/blocks.001/blocks.1.video.ff.proj_in.lo: damaged: its SHA-256 is " in out


@pytest.mark.parametrize("how", ["flipped", "gone", "no JSON", "outside"])
def test_nothing_is_proved_by_another_inventory(how, copy, capsys):
    path = copy / INVENTORY
    if how == "flipped":
        path.write_text(path.read_text().replace("packed as it came", "packed as it went", 1))
    elif how == "outside":
        path.write_text(json.dumps({"arrays": {"../..": {}}, "files": {}, "tensors": {}}))
    elif how == "no JSON":
        path.write_text("{")
    else:
        path.unlink()
    found = verify(copy)
    assert [fault.item for fault in found.faults] == [INVENTORY]
    assert found.faults[0].what.startswith("missing" if how == "gone" else "damaged")
    assert found.num_arrays == 0
    assert main(["verify", str(copy)]) == 1
    assert "without it no array can be proved" in capsys.readouterr().out


def test_parts_that_the_manifest_lacks_are_damage(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["parts"]["transformer"].remove("blocks.001")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert [fault.what for fault in verify(copy).faults] == [
        f"damaged: transformer/blocks.001 is in {INVENTORY} and not in {MANIFEST}"
    ]


def test_a_folder_without_manifest_is_no_checkpoint(copy, capsys):
    (copy / MANIFEST).unlink()
    assert main(["verify", str(copy)]) == 2
    assert "its conversion did not finish" in capsys.readouterr().err


# Against the original


@pytest.fixture(scope="module")
def decoded(mini_release) -> dict[str, np.ndarray]:
    """Every linear of the miniature release as the reader decodes it."""
    facts = json.loads((mini_release / "reference/dequantised.json").read_text())
    shapes = {name: tuple(fact["shape"]) for name, fact in facts.items()}
    weights = open_folder(mini_release / PACKAGE / "polarquant", model_shapes=shapes).weights
    return {name: weight.dequantize() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def noisy(decoded) -> dict[str, np.ndarray]:
    """Originals that those may have come from: each with noise of another size."""
    rng = np.random.default_rng(0)
    return {
        name: (weight.astype(np.float32) * (1 + 0.002 * i * rng.standard_normal(weight.shape))).astype(weight.dtype)
        for i, (name, weight) in enumerate(decoded.items())
    }


@pytest.fixture
def plain(mini_release) -> dict[str, np.ndarray]:
    kept = TensorFile(mini_release / PACKAGE / "polarquant/bf16/ltx23_bf16.safetensors")
    return {name: kept.read(name) for name in kept}


def test_distances_are_those_of_the_decoded_weights(mini_checkpoint, mini_release, decoded, noisy, plain, tmp_path):
    save_file({**plain, **noisy}, tmp_path / "official.safetensors")
    found = compare(mini_checkpoint, tmp_path / "official.safetensors", gemma=mini_release / "gemma-3-mini")
    assert found.ok
    assert {linear.name for linear in found.linears} == set(decoded)
    assert [linear.relative_error for linear in found.linears] == sorted(
        (linear.relative_error for linear in found.linears), reverse=True
    )
    for linear in found.linears:
        ours, theirs = (x[linear.name].astype(np.float64) for x in (decoded, noisy))
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        cosine = np.vdot(ours, theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs)
        # Compiled decoding may round a weight next to a tie to the other bfloat16: 2^-9 of a value, seldom.
        assert linear.relative_error == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert linear.relative_squared_error == pytest.approx(linear.relative_error**2)
        assert linear.cosine == pytest.approx(cosine, abs=1e-5)
        assert linear.largest == pytest.approx(np.abs(ours - theirs).max(), rel=0.01, abs=1e-4)
        assert linear.bits == 5
    assert found.different == found.wrong_shape == ()
    upscalers = [name for name in found.not_compared if name.startswith("upscaler_")]
    assert upscalers
    assert len(upscalers) == len(found.not_compared)


def test_plain_tensors_must_be_the_original_rounded(mini_checkpoint, noisy, plain, tmp_path, capsys):
    bias, table, short = f"{BLOCK}0.attn1.to_q.bias", f"{BLOCK}1.scale_shift_table", f"{BLOCK}0.ff.net.2.bias"
    plain[table] = plain[table].astype(np.float32) * (1 + 2**-6)  # beyond the rounding of bfloat16, 2^-9
    wider = f"{BLOCK}1.audio_scale_shift_table"
    plain[wider] = plain[wider].astype(np.float32) * (1 + 2**-20)  # within
    plain[bias] = plain[bias] + np.ones((), ml_dtypes.bfloat16)
    plain[short] = plain[short][:-1]
    del plain["vae.per_channel_statistics.mean-of-means"]
    save_file({**plain, **noisy}, tmp_path / "official.safetensors", metadata={"model_version": "2.4"})
    found = compare(mini_checkpoint, tmp_path / "official.safetensors")
    assert not found.ok
    assert {tensor.name for tensor in found.different} == {bias, table}
    assert found.num_rounded == 1
    assert [text.partition(" ")[0] for text in found.wrong_shape] == [short]
    assert "vae.per_channel_statistics.mean-of-means" in found.not_compared
    assert main(["verify", str(mini_checkpoint), "--against", str(tmp_path / "official.safetensors"), "--all"]) == 1
    text = " ".join(capsys.readouterr().out.split())  # long names take two lines
    assert f"DIFFERENT {bias}: relative error" in text
    assert "versions 2.3.0, the original 2.4" in text
    assert text.partition("plain tensors")[0].count("transformer_blocks.") == 56
    assert "was not made from" in text


def test_weights_of_another_model_are_far_off(mini_checkpoint, noisy, plain, tmp_path, capsys):
    name = f"{BLOCK}1.ff.net.0.proj.weight"
    official = {**plain, **noisy, name: np.ascontiguousarray(noisy[name][::-1])}
    save_file(official, tmp_path / "official.safetensors")
    command = ["verify", str(mini_checkpoint), "--against", str(tmp_path / "official.safetensors")]
    assert main([*command, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)["against"]
    assert not facts["ok"]
    assert facts["linears"][0]["name"] == name
    assert facts["linears"][0]["cosine"] < FAR
    assert main(command) == 1
    assert "FAR OFF        " + name in capsys.readouterr().out


def test_what_is_no_original_is_refused(mini_checkpoint, mini_release, tmp_path):
    with pytest.raises(ConvertError, match="is quantised itself"):
        compare(mini_checkpoint, mini_release / PACKAGE)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ConvertError, match="holds nothing that"):
        compare(mini_checkpoint, tmp_path / "other.safetensors")


def test_options_that_need_another_say_so(mini_checkpoint, capsys):
    assert main(["verify", str(mini_checkpoint), "--all"]) == 2
    assert "go with --against" in capsys.readouterr().err


def test_kinds_are_names_without_layers():
    def kind(name: str, component: str = "transformer") -> tuple[str, int | None]:
        distance = Distance(
            name=name,
            component=component,
            bits=5,
            relative_error=0.1,
            relative_squared_error=0.01,
            cosine=0.99,
            largest=0.1,
        )
        return distance.kind, distance.layer

    assert kind(f"{BLOCK}17.ff.net.2.weight") == ("*.ff.net.2", 17)
    assert kind("language_model.model.layers.3.mlp.up_proj.weight", "gemma") == ("*.mlp.up_proj", 3)
    assert kind("model.diffusion_model.proj_out.weight") == ("proj_out", None)


def test_errors_are_drawn(mini_checkpoint, noisy, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib runs it")
    save_file(noisy, tmp_path / "official.safetensors")
    plot(compare(mini_checkpoint, tmp_path / "official.safetensors"), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
