"""The papers' equations, written out once more: slow, literal, in float64, and without a line of flatwise in them.

Everything is one flat vector: w is the vector of all weights, rho the vector of their radii (one radius for each
coordinate, so that groups need no code), and a loss is a function of w and of a list of samples.
"""
