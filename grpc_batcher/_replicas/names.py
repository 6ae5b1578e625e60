"""What the directory and the replicas are called as Ray's named actors, and whether there is one of a name."""

from __future__ import annotations

import ray

PREFIX = "grpc_batcher."


def exists(actor_name: str) -> bool:
    """Whether an actor of this name is there, or is being restarted."""
    try:
        ray.get_actor(actor_name)
    except ValueError:
        return False
    except ray.exceptions.RayError:  # Ray itself does not answer
        return True
    return True
