"""The gRPC and HTTP services."""
