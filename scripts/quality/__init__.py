"""What `scripts/evaluate.py` measures: behaviour by captions, checkpoints against each other, autoencoders."""
