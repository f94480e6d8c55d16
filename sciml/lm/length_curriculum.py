"""Lengthen responses in training only as long as the student keeps its entropy.

Reverse-KL distillation on the student's own long responses can collapse: entropy falls, responses
run to the limit. Training therefore starts at a short cap, and the cap rises after a stage only
if the entropy of the student on held-out prompts is still high.

References
----------
.. [1] Zhao et al., "Decoupling KL and Trajectories: A Unified Perspective for SFT, DAgger,
   Offline RL, and OPD in LLM Distillation", arXiv:2605.16826, 2026.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sciml._check import check_integer, check_interval

__all__ = ["EntropyGatedLengthCurriculum"]


class EntropyGatedLengthCurriculum:
    """Cap on the length of responses that rises while the student's entropy stays high.

    After each stage ``step(entropy)`` is told the mean entropy of the student's next-token
    distributions on held-out prompts. At or above the threshold the cap becomes the next of
    `lengths`; below it the cap stays, and after `patience` such stages in a row for good. It
    never falls.

    The paper gives the first cap, 128, and the last, 4096, but neither the caps between them, nor
    the threshold, nor the length of a stage. Doubling, and half of the initial student's entropy,
    are our choice.

    Parameters
    ----------
    lengths : sequence of int, default=(128, 256, 512, 1024, 2048, 4096)
        Caps in tokens, increasing.
    stage_steps : int, default=100
        Optimiser steps from one evaluation of the entropy to the next.
    min_entropy : float or None, default=None
        Threshold in nats. None takes `min_entropy_ratio` times the entropy given to `begin`.
    min_entropy_ratio : float, default=0.5
    patience : int, default=1
        Stages in a row below the threshold after which the cap is frozen.

    Attributes
    ----------
    cap : int
        The cap in force.
    frozen : bool
        Whether the cap will not change any more.
    threshold : float or None
        The threshold in force; None before `begin`.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range or `lengths` does not increase.

    References
    ----------
    .. [1] Zhao et al., arXiv:2605.16826, 2026.

    Examples
    --------
    >>> from sciml.lm import EntropyGatedLengthCurriculum
    >>> curriculum = EntropyGatedLengthCurriculum((128, 256, 512, 1024), min_entropy=0.5)
    >>> [curriculum.step(entropy) for entropy in (1.0, 0.9, 0.2, 1.0)]
    [256, 512, 512, 512]
    >>> curriculum.frozen
    True
    """

    def __init__(
        self,
        lengths: Sequence[int] = (128, 256, 512, 1024, 2048, 4096),
        *,
        stage_steps: int = 100,
        min_entropy: float | None = None,
        min_entropy_ratio: float = 0.5,
        patience: int = 1,
    ) -> None:
        lengths = tuple(lengths)
        if not lengths:
            raise ValueError("lengths must hold one cap or more, got none")
        for length in lengths:
            check_integer("lengths", length, 1)
        if any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"lengths must increase, got {lengths}")
        check_integer("stage_steps", stage_steps, 1)
        if min_entropy is not None:
            check_interval("min_entropy", min_entropy, 0, math.inf, closed="left")
        check_interval("min_entropy_ratio", min_entropy_ratio, 0, math.inf, closed="neither")
        check_integer("patience", patience, 1)
        self.lengths = lengths
        self.stage_steps = stage_steps
        self.min_entropy = min_entropy
        self.min_entropy_ratio = min_entropy_ratio
        self.patience = patience
        self.threshold = min_entropy
        self._stage = 0
        self._low = 0

    @property
    def cap(self) -> int:
        """The cap in force, in tokens."""
        return self.lengths[self._stage]

    @property
    def frozen(self) -> bool:
        """Whether the cap will not change any more."""
        return self._low >= self.patience or self._stage == len(self.lengths) - 1

    def begin(self, entropy: float) -> None:
        """Take the initial student's entropy, from which the threshold follows by default.

        Parameters
        ----------
        entropy : float
            In nats, on held-out prompts at the first cap.
        """
        self._check_entropy(entropy)
        if self.min_entropy is None:
            self.threshold = self.min_entropy_ratio * entropy

    def step(self, entropy: float) -> int:
        """End a stage and return the cap of the next.

        Parameters
        ----------
        entropy : float
            Mean entropy of the student on held-out prompts at the present cap, in nats.

        Returns
        -------
        int

        Raises
        ------
        ValueError
            If the entropy is negative or not finite, or there is no threshold yet.
        """
        self._check_entropy(entropy)
        if self.threshold is None:
            raise ValueError("begin must be called with the initial entropy, or min_entropy given")
        if self._low >= self.patience:
            return self.cap
        if entropy >= self.threshold:
            self._low = 0
            self._stage = min(self._stage + 1, len(self.lengths) - 1)
        else:
            self._low += 1
        return self.cap

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, serialisable as JSON."""
        return {
            "lengths": list(self.lengths),
            "stage": self._stage,
            "low": self._low,
            "threshold": self.threshold,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another curriculum of the same lengths was.

        Raises
        ------
        ValueError
            If the lengths differ.
        """
        if tuple(state["lengths"]) != self.lengths:
            raise ValueError(f"lengths must be the state's {state['lengths']}, got {self.lengths}")
        self._stage, self._low = int(state["stage"]), int(state["low"])
        self.threshold = state["threshold"]

    @staticmethod
    def _check_entropy(entropy: float) -> None:
        check_interval("entropy", entropy, 0, math.inf, closed="left")
