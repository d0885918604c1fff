"""``python -m vitcompress``."""

from vitcompress.cli import main

if __name__ == "__main__":
    main()
