"""The coordinator: rounds, cohorts, transport over Flower, journal."""
