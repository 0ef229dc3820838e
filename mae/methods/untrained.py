"""The encoder with its first, random weights: the control that tells what training added."""

from mae.methods.base import Autoencoder


class Untrained(Autoencoder):
    """Features of an encoder that has learnt nothing."""

    learns = False
