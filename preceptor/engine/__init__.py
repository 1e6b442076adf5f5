"""``Run`` and its plumbing: settings, distribution, checkpoints, the run's folder, metrics."""
