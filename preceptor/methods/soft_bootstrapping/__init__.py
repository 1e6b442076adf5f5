"""soft_bootstrapping: a model teaches itself from verified attempts."""
