"""The paper's formulas and choices, in numpy and scipy alone."""
