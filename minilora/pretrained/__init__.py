"""Pretrained models: checkpoints and adapters on disk."""
