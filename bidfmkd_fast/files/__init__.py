"""Write files whole or not at all, lock folders, and read files with errors that name them."""
