"""mathdial: a tutor learns from dialogues with a simulated student."""
