"""Formats of bodies and lines: framing, checking, JSON depth, decompression. No I/O."""
