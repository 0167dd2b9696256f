"""The run folder: what is written where, so that a killed run resumes."""
