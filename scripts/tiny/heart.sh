#!/usr/bin/env bash
# Teaches a checkpoint of the miniature release a shape that it has never seen, from a folder of clips, and holds it to
# what it makes of the shapes it knows: the LoRA is RUN/heart.safetensors.
# scripts/tiny/heart.sh CHECKPOINT RUN [OPTIONS of finetune.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../_environment.sh"
prepare ""
checkpoint=$1 run=$2
python=.venv/bin/python

[ -d "$run/heart-clips" ] || $python -m scripts.tiny.draw "$run/heart-clips" --shapes heart --count 240
[ -d "$run/kept-clips" ] || $python -m scripts.tiny.draw "$run/kept-clips" --count 480 --seed 5
$python finetune.py --checkpoint "$checkpoint" --clips "$run/heart-clips" --keep "$run/kept-clips" --run "$run/heart" \
    --width 64 --height 48 --num-frames 33 --targets 'transformer_blocks\.\d+\.(attn1|attn2|ff)\..*' --rank 4 \
    --steps 1200 --batch-size 8 --learning-rate 2e-3 "${@:3}" # in the picture's stream alone
cp "$run/heart/lora.safetensors" "$run/heart.safetensors"
