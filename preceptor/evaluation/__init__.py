"""What a student can do: language measures, probes, and the power law of a run's distance to its teacher."""
