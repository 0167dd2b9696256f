"""The process that one reward function runs in. Imports nothing of gvpo, so that it starts in a tenth of a second."""
