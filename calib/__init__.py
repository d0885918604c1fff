"""Image sources for calibration and evaluation."""

__all__: list[str] = []
