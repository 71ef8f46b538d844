"""One model from start to checkpoint: step, measurement, log, trial."""
