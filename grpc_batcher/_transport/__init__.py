"""How bytes move between gRPC and either end of a stream. `interface` is the way in."""
