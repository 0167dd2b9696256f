"""The checks behind the alerts, by subject. Each reads `Recent` after a step and yields alerts."""
