"""Ask black boxes behind a network: HTTP, gRPC, the Open Inference Protocol v2, any JSON API."""
