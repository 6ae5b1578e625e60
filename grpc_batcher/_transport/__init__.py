"""How bytes move between gRPC and either end of a stream. `choice` is the way in, `interface` what it gives."""
