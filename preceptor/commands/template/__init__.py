"""template: a digit that the student never saw, learned from soft targets."""
