"""How any stage runs: settings, tables, the files of a run, units, and the model."""
