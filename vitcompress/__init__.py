"""Compression of vision transformers after training."""

__all__: list[str] = []
