#!/usr/bin/env bash
# Trains every model of the miniature release from nothing, with fixed seeds, and writes RELEASE (by default release/).
# Whatever was stopped goes on where it was; hours on two cores: docs/training.md.
#   scripts/tiny/train.sh RUN [RELEASE [STEPS CLIPS]]     a few steps of each stage on few clips (40 or more): a rehearsal
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_environment.sh"
prepare train
run=${1:?"scripts/tiny/train.sh RUN [RELEASE]: RUN is the folder to train in"} release=${2:-release} steps=${3:-} clips=${4:-}
python=.venv/bin/python

stage() { [ -f "$run/$1.safetensors" ] || $python -m scripts.tiny.train "$1" "$run" --seed 0 ${steps:+--steps "$steps"} \
        ${clips:+--clips "$clips"}; }

for name in video-vae video-vae-sharp video-vae-fine video-decoder audio-vae vocoder vocoder-fine bandwidth language \
    upscaler transformer transformer-fine; do
    stage "$name"
done
$python -m scripts.tiny.build official "$run" # the published files, and checkpoints that LoRAs are trained beside
stage distilled
scripts/tiny/heart.sh "$run/packed" "$run" ${steps:+--steps "$steps"} # a new shape, as anyone would teach it
$python -m scripts.tiny.build package "$run" "$release"
