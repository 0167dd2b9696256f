"""The views of a run for people and trackers: console, alerts, named metrics."""
