"""Quality of a checkpoint as exported, measured against the original model."""
