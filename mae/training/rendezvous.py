"""Ranks find each other, also when torchrun has started them again.

torchrun's store outlives the ranks that it starts again after a failure, with the addresses of the dead ones in it: who reads an address
before its new owner has written it waits for nobody. So all ranks of one attempt meet under a name of their own: each asks with a word that
no other process has used, and rank 0 answers every word with its own.
"""

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

PAUSE_SECONDS = 0.02


def fresh_store(timeout: timedelta) -> tuple[Store, int, int]:
    """(a store that only the living ranks of this attempt use, rank, world). Raises RuntimeError where some do not come in time."""
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return store, rank, world
    store.set_timeout(timeout)
    word, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    if rank == 0:
        _answer(store, word, world, deadline)
    else:
        store.set(f"mae/asks/{rank}", word)
        theirs = store.get(f"mae/answer/{word}").decode()
        store.set(f"mae/heard/{theirs}/{rank}", "")
        word = theirs
    return PrefixStore(f"mae/attempt/{word}", store), rank, world


def _answer(store: Store, word: str, world: int, deadline: float) -> None:
    """Answers what the ranks ask, words of dead ones among them, until all have heard."""
    silent, answered = set(range(1, world)), set()
    while silent:
        for rank in [r for r in silent if store.check([f"mae/asks/{r}"])]:
            asked = store.get(f"mae/asks/{rank}").decode()
            if asked not in answered:
                store.set(f"mae/answer/{asked}", word)
                answered.add(asked)
        silent = {r for r in silent if not store.check([f"mae/heard/{word}/{r}"])}
        if silent and time.monotonic() > deadline:
            raise RuntimeError(f"gloo: ranks {sorted(silent)[:8]} did not come to the rendezvous")
        time.sleep(PAUSE_SECONDS if silent else 0)
