"""The training loop and what surrounds it: controller, launch, logging."""
