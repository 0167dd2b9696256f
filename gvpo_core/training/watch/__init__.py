"""What people and trackers see of a run: console, alerts, metrics by name."""
