"""The run folder and its files, from which a killed run resumes."""
