"""From gradients to updated weights: averaging, ZeRO stages, clipping, loss scaling, AdamW."""
