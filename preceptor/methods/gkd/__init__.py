"""gkd: generalised knowledge distillation, off-policy to on-policy."""
