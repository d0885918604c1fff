"""Models by name, by file, and by the names and shapes of their tensors."""

__all__: list[str] = []
