#!/usr/bin/env bash
# The tables of docs/quality.md: every measurement of a release trained by scripts/tiny/train.sh, as JSON in RUN/quality.
# What was measured is not measured again. scripts/tiny/evaluate.sh RUN
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_environment.sh"
prepare ""
run=${1:?"scripts/tiny/evaluate.sh RUN: RUN is the folder that was trained in"}
python=.venv/bin/python
lora=$run/distilled.safetensors

variant() { # variant NAME OPTIONS: the official file packed in another way
    local dest=$run/variants/$1
    shift
    [ -f "$dest/manifest.json" ] || $python -m convert "$run/ltx-2.3-tiny.safetensors" "$dest" --block-size 64 \
        --gemma "$run/gemma-3-tiny" --gemma-bits 16 --upscaler "$run/upscaler.safetensors" \
        --quantize blocks,connectors,projection,adaln "$@"
}
measure() { # measure NAME COMMAND OPTIONS
    local name=$1
    shift
    [ -f "$run/quality/$name.json" ] ||
        $python scripts/evaluate.py "$@" --output "$run/quality/$name.json"
}

mkdir -p "$run/quality" "$run/variants"
[ -e "$run/variants/bf16" ] || ln -s "$(realpath "$run/checkpoint")" "$run/variants/bf16"
variant 5-fitted --recipe fitted
variant 5-published --recipe published
variant 5-scalar
variant 5-trellis --recipe trellis
variant 4-scalar --bits '*=4'
variant 6-scalar --bits '*=6'

guided="--pipeline dev --steps 16 --cfg-scale 3"
for name in bf16 5-fitted 5-scalar 5-published; do
    # shellcheck disable=SC2086
    measure "dev-$name" captions --checkpoint "$run/variants/$name" $guided
done
for name in bf16 6-scalar 5-trellis 5-scalar 5-fitted 5-published 4-scalar; do
    measure "captions-$name" captions --checkpoint "$run/variants/$name" --lora "$lora"
done
for name in bf16 5-fitted; do # three noises each, as one clip more or less is 0.4 points
    measure "three-$name" captions --checkpoint "$run/variants/$name" --lora "$lora" --seeds 3
done
against=()
for name in 6-scalar 5-trellis 5-scalar 5-fitted 5-published 4-scalar; do against+=("$run/variants/$name"); done
measure compare compare --reference "$run/variants/bf16" --against "${against[@]}" --lora "$lora" \
    --sheet "$run/quality/compare.png"
measure coding coding --checkpoint "$run/variants/bf16" --count 24

packed=$run/variants/5-fitted # as it is released
heart=$run/heart.safetensors
measure heart captions --checkpoint "$packed" --lora "$lora" "$heart" --shapes heart
measure heart-without captions --checkpoint "$packed" --lora "$lora" --shapes heart
measure heart-others captions --checkpoint "$packed" --lora "$lora" "$heart" # without it: captions-5-fitted
measure heart-validation captions --checkpoint "$packed" --lora "$lora" "$heart" --shapes heart --split validation
# shellcheck disable=SC2086
measure heart-guided captions --checkpoint "$packed" --lora "$heart" --shapes heart $guided
# shellcheck disable=SC2086
measure heart-others-guided captions --checkpoint "$packed" --lora "$heart" $guided # without it: dev-5-fitted
measure image captions --checkpoint "$packed" --lora "$lora" --count 40 --image
measure upright captions --checkpoint "$packed" --lora "$lora" --count 40 --upright
measure two-stage captions --checkpoint "$packed" --lora "$lora" --count 24 --pipeline two-stage --scale 2
measure upscaled captions --checkpoint "$packed" --lora "$lora" --count 24 --upscale
measure seeds captions --checkpoint "$packed" --lora "$lora" --count 16 --seeds 3

$python scripts/evaluate.py tables "$run/quality"
