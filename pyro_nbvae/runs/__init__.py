"""One run: its configuration, building it, its folder, training, evaluation, generation, several processes."""
