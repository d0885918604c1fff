"""What goes wrong with images: a source that cannot be used, a sample that cannot be read."""


class SourceError(Exception):
    """A source, or a setting of it, cannot be used; the message says what to do."""


class UnreadableError(Exception):
    """One sample cannot be read. Sources catch it, skip the sample and keep the reason."""
