"""The check of what a GPU computes, for a machine without a network: `make gpu-check`."""
