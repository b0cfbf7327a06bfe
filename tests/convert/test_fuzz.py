"""Packages damaged at random are refused, or become what their files say: see `fuzz`, which replays a seed."""

import time

import numpy as np
import pytest

from convert import convert

from . import decoder, fuzz, tiny
from .mutations import mutant

FEW, MANY = 300, 2100
AT_ONCE = 150  # so that they spread over the workers of a test run


@pytest.mark.parametrize("first", range(0, FEW, AT_ONCE))
def test_damaged_packages_are_refused_or_become_what_they_say(first):
    counts = fuzz.in_another_process(range(first, first + AT_ONCE))
    assert counts["refused"] > AT_ONCE / 3
    assert counts["converted"] > AT_ONCE / 10


@pytest.mark.slow
def test_thousands_of_damaged_packages_are_refused_or_become_what_they_say(capsys):
    started = time.monotonic()
    counts = fuzz.in_another_process(range(FEW, FEW + MANY))
    with capsys.disabled():
        print(f"\n{sum(counts.values())} damaged packages in {time.monotonic() - started:.0f} s: {counts}")
    assert sum(counts.values()) == MANY


@pytest.mark.parametrize("release", tiny.releases(), ids=lambda release: release.name)
def test_undamaged_packages_become_what_they_say(release, tmp_path):
    source, dest = release.write(tmp_path / "source"), tmp_path / "dest"
    with fuzz.cheaply():
        manifest = convert(source, dest, gemma_bits=16)
    fuzz.compare(release, source, dest, manifest)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.blocks.0.video.ff.proj_in.lo",
        "transformer.shared.video.patchify.kernel",
        "vocoder.shared.bwe.conv_pre.bias",
    ],
)
def test_the_judge_sees_one_bit_in_any_array(name, tmp_path):
    """A judge that finds nothing would pass all packages."""
    release = tiny.packed("V5", 5)
    source, dest = release.write(tmp_path / "source"), tmp_path / "dest"
    with fuzz.cheaply():
        manifest = convert(source, dest)
    component, part, path = name.split(".", 2)
    part = "blocks.000" if part == "blocks" else part
    path = f"blocks.{path}" if part == "blocks.000" else path
    chunk = next((dest / component / part / path).glob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[1] ^= 16
    chunk.write_bytes(data)
    with pytest.raises(AssertionError, match="has other values"):
        fuzz.compare(release, source, dest, manifest)


def test_a_seed_always_gives_the_same_mutant():
    first, again = mutant(11), mutant(11)
    assert first[1:] == again[1:]
    assert first[1] != dict(first[0].files)


def test_the_decoder_reads_what_the_original_packer_wrote(mini_release):
    """It judges the converter, so it must not be wrong in the same way: here is a third opinion."""
    hlwq = mini_release.parent / "hlwq"
    expected = decoder.tensors(hlwq / "dequantised_bf16_tableA.safetensors")
    found = decoder.tensors(hlwq / "hlwq_q5_meta5/model-00001-of-00001.safetensors")
    name = next(name for name in sorted(expected) if f"{name}__packed" in found or f"{name}.weight__packed" in found)
    values = expected[name].astype(np.float64)
    full = name if name.endswith(".weight") else f"{name}.weight"
    weight = decoder.stored(found, full, tiny.Packed("V6", 5, 128), values.shape, {"table": "A"})
    decoded = decoder.decode(weight, 128).reshape(len(values), -1)[:, : values.shape[1]]
    assert np.abs(decoded - values).max() <= 2**-8 * np.abs(values).max()  # of bfloat16
