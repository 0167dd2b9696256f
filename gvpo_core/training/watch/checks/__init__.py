"""The checks behind the alerts, by subject. Each looks at `Recent` after a step and yields what is wrong."""
