"""Training: one loop on accelerate, the losses, distillation."""
