"""What a teacher gives for a text, kept on disk for any number of students and epochs.

Targets are found by the content of token sequences, so that shuffling, appending and several epochs need no
bookkeeping. Three kinds: the last hidden states, quantised where the output head looks, with the head kept once (the
nearest by far for teachers of moderate width); the likeliest tokens with the mass of the others; and unbiased samples.
"""

from __future__ import annotations

from preceptor.cache.capture import CapturePlan, capture
from preceptor.cache.choice import Wanted
from preceptor.cache.reading import Cache

__all__ = ["Cache", "CapturePlan", "Wanted", "capture"]
