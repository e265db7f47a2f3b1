"""Files: written whole or not at all, locked by their run, read with errors that name them."""
