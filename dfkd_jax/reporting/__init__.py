"""What a run shows: metrics, a progress bar, pictures and a page."""
