"""A single run: configuration, model building, run folder, training, evaluation, generation, multiple processes."""
