"""What distillation methods share: teachers, the objective, lessons, on-policy samples."""
