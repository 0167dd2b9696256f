"""Files: writes that survive a power loss, JSON lines, Git LFS pointers."""
