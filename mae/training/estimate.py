"""What a run needs on paper: bytes a rank before anything runs. Plain arithmetic: imports nothing, touches nothing.

Sources: ZeRO, arXiv:1910.02054, section 3; FSDP, arXiv:2304.11277, section 3.
"""

FLOAT32 = 4  # bytes; weights, gradients and moments are kept in it whatever the precision of the forward pass


def state_bytes(parameters: int, *, trained: int | None = None, moments: int = 2, average: bool = False, shards: int = 1) -> float:
    """Bytes of weights, gradients, optimizer moments and, where kept, the average of the weights, on one rank.

    `trained` of the parameters have a gradient (default: all); `moments` is 2 for AdamW, 1 for momentum; spread over `shards` ranks (FSDP).
    With AdamW that is 16 bytes a parameter, as in ZeRO's figure 1 with the float32 weights as the only copy.
    """
    trained = parameters if trained is None else trained
    return FLOAT32 * (parameters + (1 + moments + average) * trained) / shards
