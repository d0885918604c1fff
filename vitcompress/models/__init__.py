"""Models by name, by file, and by the names and shapes of their tensors.

``load_model`` turns what a user names (a weights file, a library's model, a factory) into a
module with its preprocessing. Files are judged by content, and nothing inside one is executed
unless the caller says that the file is trusted.
"""

from vitcompress.models.architecture import create_architecture
from vitcompress.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "create_architecture", "load_model"]
