"""What a run is in the store: its name, its checkpoints, who may write, and the best network."""
