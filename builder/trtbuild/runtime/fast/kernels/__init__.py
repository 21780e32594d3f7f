"""Kernels in the Triton language; each module holds kernels and the typed functions that launch them.

Legend: T or B rows (tokens of a step), D head size, H key/value heads, Hq query heads, G = Hq / H, S slots.
"""
