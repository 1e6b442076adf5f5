"""obow: a backbone predicts the visual words of its momentum copy."""
