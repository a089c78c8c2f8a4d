"""What services and training share of torch. Nothing else in `steersman` imports torch."""
