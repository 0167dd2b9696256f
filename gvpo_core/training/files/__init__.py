"""Files: writes that survive a power loss, JSON lines, fingerprints of inputs, Git LFS pointers."""
