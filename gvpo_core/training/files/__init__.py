"""Files: writes that survive a power loss, JSON-lines files, Git LFS pointers, datasets of the hub."""
