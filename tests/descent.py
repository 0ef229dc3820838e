"""A short training, for tests that ask whether a loss falls."""

import torch


def descend(method, images, keys, steps, rate=3e-3, dtype=None):
    """Losses of `steps` of AdamW."""
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = method(images, keys=keys).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
