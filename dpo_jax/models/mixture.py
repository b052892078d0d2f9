"""A mixture of experts, as plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """The MLP of a layer as many small ones, the experts, of which each token uses a few.

    Attributes:
      experts: E.
      chosen: k, the experts of a token, those with the largest router probabilities; at most E.
      renormalized: the weights of the chosen are their probabilities divided by the sum of these, not as they are.
    """

    experts: int
    chosen: int
    renormalized: bool
