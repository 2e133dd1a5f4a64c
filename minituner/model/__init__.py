"""The model's side of the walk: where it comes from, how it is loaded, attention, adapters and loss. NB 05 to 07."""
