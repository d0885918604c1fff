"""Writing compressed models for runtimes."""
